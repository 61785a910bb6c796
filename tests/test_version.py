"""The version is one, everywhere it is told."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.version import Version

import xtuner
from xtuner.entry_point import main

ROOT = Path(__file__).parent.parent


def test_the_version_is_told_alike(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == xtuner.__version__
    assert str(Version(xtuner.__version__)) == xtuner.__version__
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert heading and heading[1] == xtuner.__version__
    for readme in ("README.md", "README_zh-CN.md"):
        assert f"`{xtuner.__version__}`" in (ROOT / readme).read_text("utf-8")


def test_it_is_above_that_of_the_other_program_of_this_name_on_pypi():
    assert Version("0.2.0") < Version(xtuner.__version__)


def test_the_parts_of_the_version():
    assert xtuner.version_info[:3] == (1, 0, 0)
    assert ".".join(map(str, xtuner.version_info)) == xtuner.__version__


def test_the_lowest_versions_are_the_floors_of_pyproject():
    """`make test-lowest` installs requirements/lowest.txt: what it does not test is no floor."""
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    tested = project[project.index("dependencies = [") : project.index("\ntest = [")]
    floors = re.findall(r'"([\w-]+)>=([\d.]+)', tested)
    skipped = {"flash-attn", "lagent", "liger-kernel"}  # not in the tests
    skipped |= {"mkdocs-material", "jieba"}  # of the site
    wanted = {name: Version(floor) for name, floor in floors if name not in skipped}
    lines = (ROOT / "requirements/lowest.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: Version(version) for name, version in pinned.items()} == wanted
