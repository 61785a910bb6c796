"""Arguments that commands share mean the same in each of them."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Mapping

import pytest

from xtuner.entry_point import COMMANDS, Command, main
from xtuner.utils.terminal import width

WITH_OPTIONS = (
    *("train", "test", "print_cfg", "check_cfg", "check_custom_dataset", "log_dataset"),
    *("data_preprocess.sft", "model_converters.pth_to_hf"),
)


def commands(level: Mapping[str, Command] = COMMANDS) -> Iterator[tuple[list[str], str]]:
    """The words of each command, and its module ('' where it only has commands below it)."""
    for name, command in level.items():
        yield [name], command.module
        yield from (([name, *words], module) for words, module in commands(command.commands))


def parser_of(module: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"xtuner.tools.{module}").add_arguments(parser)
    return parser


@pytest.mark.parametrize("module", WITH_OPTIONS)
def test_config_options_add_up(module):
    (action,) = [a for a in parser_of(module)._actions if a.dest == "cfg_options"]
    parser = argparse.ArgumentParser()
    parser._add_action(action)
    words = ["--cfg-options", "a=1", "b=2", "--cfg-options", "c=3"]
    assert parser.parse_args(words).cfg_options == ["a=1", "b=2", "c=3"]
    assert parser.parse_args([]).cfg_options == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("chat", "torch_dtype"),
        ("model_converters.llava", "torch_dtype"),
        ("model_converters.merge", "dtype"),
        ("model_converters.pth_to_hf", "dtype"),
    ],
)
def test_dtypes(module, name):
    (action,) = [a for a in parser_of(module)._actions if a.dest == name]
    assert set(action.choices) == {"auto", "fp32", "fp16", "bf16"}
    assert action.default == "auto" and action.help


@pytest.mark.parametrize("module", ["llava", "phi_to_llama", "merge", "pth_to_hf"])
def test_shard_sizes(module):
    (action,) = [
        a for a in parser_of(f"model_converters.{module}")._actions if a.dest == "max_shard_size"
    ]
    assert action.default == "2GB"


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
        for action in parser_of(module)._actions
        if not action.help
    ]
    assert not silent, "\n".join(silent)
