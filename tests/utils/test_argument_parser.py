"""The help of every command: it fits a terminal, and each argument says what it is."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Mapping

import pytest

from xtuner.entry_point import COMMANDS, Command, main
from xtuner.utils.terminal import width


def commands(level: Mapping[str, Command] = COMMANDS) -> Iterator[tuple[list[str], str]]:
    """The words of each command, and its module ('' where it only has commands below it)."""
    for name, command in level.items():
        yield [name], command.module
        yield from (([name, *words], module) for words, module in commands(command.commands))


def arguments_of(module: str) -> list[argparse.Action]:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"xtuner.tools.{module}").add_arguments(parser)
    return parser._actions


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_help_fits_a_terminal(language, capsys, monkeypatch):
    monkeypatch.setenv("XTUNER_LANG", language)
    monkeypatch.setenv("COLUMNS", "80")
    too_wide = []
    for words in [[], *(words for words, _ in commands())]:
        try:
            main([*words, "--help"])
        except SystemExit as end:
            assert not end.code
        said = capsys.readouterr().out
        assert said, words
        too_wide += [
            f"{words}: {line}"
            for line in said.splitlines()
            if width(line) > 80 and not line.startswith("  xtuner ")  # examples are one line
        ]
    assert not too_wide, "\n".join(too_wide)


def test_every_argument_says_what_it_is():
    silent = [
        f"{module}: {action.option_strings or action.dest}"
        for _, module in commands()
        if module
        for action in arguments_of(module)
        if not action.help
    ]
    assert not silent, "\n".join(silent)
