"""A command says that it loads the large libraries, once, and only where it does."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from xtuner.utils import announce
from xtuner.utils.announce import announced_libraries

FIRST, SECOND = "a_large_library", "another_large_library"


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As at the start of a command: nothing large is loaded yet."""
    for name in (FIRST, SECOND, "a_small_library"):
        (tmp_path / f"{name}.py").write_text("VALUE = 7\n")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(announce, "LARGE", (FIRST, SECOND))
    monkeypatch.delenv("RANK", raising=False)


def test_the_first_large_library_is_announced(capsys):
    with announced_libraries():
        importlib.import_module("a_small_library")
        assert importlib.util.find_spec(FIRST) is not None  # only looked for
        assert capsys.readouterr() == ("", "")
        assert importlib.import_module(FIRST).VALUE == 7
        importlib.import_module(SECOND)
        assert capsys.readouterr() == ("", "loading the libraries ...\n")


def test_nothing_is_left_behind(capsys):
    before = list(sys.meta_path)
    with pytest.raises(ZeroDivisionError), announced_libraries():
        raise ZeroDivisionError
    assert sys.meta_path == before
    importlib.import_module(FIRST)
    assert capsys.readouterr() == ("", "")


def test_other_processes_say_nothing(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with announced_libraries():
        importlib.import_module(FIRST)
    assert capsys.readouterr() == ("", "")


def test_nor_does_a_command_whose_libraries_are_loaded(capsys):
    importlib.import_module(FIRST)
    with announced_libraries():
        importlib.import_module(SECOND)
    assert capsys.readouterr() == ("", "")


def test_a_library_that_is_not_there_is_an_error_as_before():
    announce.LARGE = (FIRST, "no_such_library")
    with announced_libraries(), pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_library")
