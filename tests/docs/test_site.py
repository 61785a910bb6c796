"""The docs' site: every page is in its navigation, in both languages, and its links are right."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import yaml

from tests.docs.test_pages import ROOT


class Loader(yaml.SafeLoader):
    """YAML with mkdocs' names of Python functions, which are not looked up."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def pages_of(entry: object) -> list[str]:
    """The files of a part of the navigation, in order."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in pages_of(part)]


@pytest.fixture(scope="module")
def nav() -> list[str]:
    return pages_of(yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader)["nav"])


def test_every_page_is_in_the_navigation_once(nav):
    pages = sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md"))
    assert sorted(nav) == pages


def test_both_languages_are_in_one_order(nav):
    english, chinese = (
        [page.partition("/")[2] for page in nav if page.startswith(folder)]
        for folder in ("en/", "zh_cn/")
    )
    assert english == chinese


def test_the_choice_of_language_leads_to_pages():
    """mkdocs makes ``index.html`` of a ``README.md``."""
    settings = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader)
    for language in settings["extra"]["alternate"]:
        page = ROOT / "docs" / language["link"].replace("index.html", "README.md")
        assert page.with_suffix(".md").is_file(), language["link"]
        assert not language["link"].endswith("README.html")


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="needs the extra 'docs'")
def test_it_builds_without_a_broken_link(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "en" / "tutorial.html").is_file()
