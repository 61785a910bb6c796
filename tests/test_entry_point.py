"""The command tree: help, versions, suggestions, exit statuses, and what it may import."""

import subprocess
import sys

import pytest

from xtuner import __version__
from xtuner.entry_point import COMMANDS, main

HEAVY = ("torch", "transformers", "mmengine", "datasets", "peft", "numpy")


def leaves():
    for name, command in COMMANDS.items():
        if command.commands:
            yield from ([name, sub] for sub in command.commands)
        else:
            yield [name]


@pytest.mark.parametrize("words", [[], ["help"], ["-h"], ["--help"], ["HELP"]])
def test_overview_names_every_command(words, capsys):
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("word", ["version", "-v", "--version"])
def test_version(word, capsys):
    assert main([word]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_unknown_command_gets_a_suggestion(capsys):
    assert main(["trian", "x.py"]) == 2
    err = capsys.readouterr().err
    assert "there is no command 'xtuner trian'" in err
    assert "did you mean 'xtuner train'?" in err


def test_unknown_subcommand_gets_a_suggestion(capsys):
    assert main(["convert", "merg"]) == 2
    assert "did you mean 'xtuner convert merge'?" in capsys.readouterr().err


def test_a_wrong_argument_is_one_message(capsys):
    assert main(["copy-cfg"]) == 2
    err = capsys.readouterr().err
    assert "[NAME] DIR" in err
    assert "Traceback" not in err


def test_chinese(monkeypatch, capsys):
    monkeypatch.setenv("XTUNER_LANG", "zh_CN")
    assert main(["trian"]) == 2
    assert "没有命令" in capsys.readouterr().err


def test_interrupt_is_130(monkeypatch, capsys):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr("xtuner.entry_point._dispatch", interrupted)
    assert main(["list-cfg"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_helps_and_list_cfg_import_nothing_heavy():
    """One process runs every --help and list-cfg; none of them may load a heavy package."""
    code = f"""
import contextlib, io, sys
from xtuner.entry_point import main
for words in {list(leaves())!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(words + ["--help"])
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    assert not loaded, (words, loaded)
with contextlib.redirect_stdout(io.StringIO()):
    assert main(["list-cfg"]) == 0
assert not [name for name in {HEAVY!r} if name in sys.modules], "list-cfg"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
