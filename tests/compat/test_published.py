"""All 578 published configs load, name things that exist, call them right, and take overrides.

The files are data, fetched by pip into a temporary folder; nothing else of that wheel is unpacked.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.compat.overrides import unreached
from tests.helpers.forked import LIMIT
from tests.helpers.tiers import few_fast
from xtuner.config.check import Problem
from xtuner.config.check.calls import OPTIONAL_PACKAGES
from xtuner.config.check.checker import check_document
from xtuner.config.compat import adapt_published
from xtuner.config.load import load

COUNT = 578
PARTS = 10  # each has the time limit of a test


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The published config files, without the conversion scripts that lay beside them."""
    folder = tmp_path_factory.mktemp("published")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--ignore-requires-python"]
    command += ["--quiet", "--disable-pip-version-check", "-d", str(folder), "xtuner==0.1.23"]
    got = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    if got.returncode:
        pytest.skip(f"no published configs: pip download failed: {got.stderr.strip()[-200:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        names = [n for n in wheel.namelist() if n.startswith("xtuner/configs/")]
        wheel.extractall(folder, [n for n in names if n.endswith(".py")])
    files = sorted((folder / "xtuner" / "configs").rglob("*.py"))
    scripts = [file for file in files if "if __name__ ==" in file.read_text("utf-8")]
    return [file for file in files if file.name != "__init__.py" and file not in scripts]


@dataclass(frozen=True)
class Seen:
    """What there is to say of a config."""

    has_model: bool
    problems: list[Problem]
    unreached: list[str]
    adapted: str


@pytest.fixture(scope="module", params=few_fast(range(PARTS), [0]))
def seen(published: list[Path], request: pytest.FixtureRequest) -> dict[Path, Seen]:
    """All that the tests ask of each config of a part, which is loaded once."""
    found = {}
    for file in published[request.param :: PARTS]:
        document = load(file)
        problems, missed = check_document(document), unreached(document)
        adapt_published(document.config)  # the last: it changes the values
        adapted = str(document.values)
        found[file] = Seen(document.values["model"] is not None, problems, missed, adapted)
    return found


def test_all_are_there_and_load(published, seen):
    assert len(published) == COUNT
    assert all(each.has_model for each in seen.values())


def test_every_name_exists_and_every_call_fits(seen):
    wrong = [
        problem
        for each in seen.values()
        for problem in each.problems
        if problem.code.startswith(("XT00", "XT01", "XT02")) and problem.severity == "error"
    ]
    assert not wrong, "\n".join(sorted({problem.message for problem in wrong}))


def test_only_listed_packages_are_optional(seen):
    absent = {p.message for each in seen.values() for p in each.problems if p.code == "XT0107"}
    assert all(any(name in message for name in OPTIONAL_PACKAGES) for message in absent)


def test_published_spellings_are_adapted(seen):
    for file, each in seen.items():
        for spelling in ("torch_dtype", "ignore_verifications"):
            assert spelling not in each.adapted, file


def test_overrides_reach_in_published(seen):
    wrong = {str(file): each.unreached for file, each in seen.items() if each.unreached}
    assert not wrong
