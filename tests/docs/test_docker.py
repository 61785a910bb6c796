"""The ``Dockerfile``, which is not built here: its paths, extras and arguments exist."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from tests.docs.test_pages import ENGLISH, ROOT, blocks_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def arguments(instruction: str) -> list[str]:
    """What follows each instruction of a name."""
    return re.findall(rf"^{instruction} +(.*)$", TEXT, re.M)


ARGS = dict(argument.split("=", 1) for argument in arguments("ARG"))
COPIED = [path for copy in arguments("COPY") for path in copy.split()[:-1]]


def test_what_it_copies_is_here_and_not_ignored():
    allowed = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text("utf-8"), re.M))
    assert COPIED
    for path in COPIED:
        assert (ROOT / path).exists(), path
        assert Path(path).parts[0] in allowed, path


def test_what_the_installation_reads_is_copied():
    needed = {"pyproject.toml", "xtuner", PROJECT["readme"], *PROJECT["license-files"]}
    constraints = re.findall(r"--constraint (\S+)", TEXT)
    assert needed | set(constraints) <= set(COPIED)


def test_its_extras_exist():
    assert set(ARGS["EXTRAS"].split(",")) <= set(PROJECT["optional-dependencies"])


def test_its_python_is_supported():
    (version,) = re.findall(r"^FROM python:([\d.]+)", TEXT, re.M)
    assert version in SpecifierSet(PROJECT["requires-python"])


def test_its_command_is_the_package_s():
    (entry,) = arguments("ENTRYPOINT")
    assert entry == f'["{next(iter(PROJECT["scripts"]))}"]'


@pytest.mark.parametrize("page", [None, ENGLISH / "clusters.md"])
def test_the_commands_give_arguments_that_it_has(page):
    lines = [line for _, block in blocks_of(page) for line in block] if page else TEXT.splitlines()
    builds = [line.lstrip("# ") for line in lines if "docker build" in line]
    assert len(builds) == 2
    for build in builds:
        words = shlex.split(build, comments=True)
        assert words[-1] == "." or page is None
        given = [words[at + 1] for at, word in enumerate(words) if word == "--build-arg"]
        assert {argument.partition("=")[0] for argument in given} <= set(ARGS)
