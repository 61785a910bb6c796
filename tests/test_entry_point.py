"""The command tree: help, versions, suggestions, exit statuses, and what it may import."""

import os
import shlex
import subprocess
import sys

import pytest

from xtuner import __version__, entry_point
from xtuner.entry_point import COMMANDS, main
from xtuner.utils.errors import RunStopped

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


@pytest.mark.parametrize("words", [["train"], ["convert", "merge"]], ids=" ".join)
def test_help_of_a_command(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["help", *words])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: xtuner {' '.join(words)} ")


def test_help_of_several_commands_and_of_none(capsys):
    assert main(["help", "convert"]) == 0
    assert "pth_to_hf" in capsys.readouterr().out
    assert main(["help", "trian"]) == 2
    assert "did you mean 'xtuner train'?" in capsys.readouterr().err


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
    assert "xtuner copy-cfg --model ./my-model --method lora --data my.jsonl ." in err
    assert "Traceback" not in err


def test_chinese(monkeypatch, capsys):
    monkeypatch.setenv("XTUNER_LANG", "zh_CN")
    assert main(["trian"]) == 2
    assert "没有命令" in capsys.readouterr().err


@pytest.mark.parametrize("end", [KeyboardInterrupt(), RunStopped("interrupted", status=130)])
def test_interrupt_is_130_and_no_error(end, monkeypatch, capsys):
    def interrupted(words):
        raise end

    monkeypatch.setattr("xtuner.entry_point._dispatch", interrupted)
    assert main(["list-cfg"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_a_message_cannot_control_the_terminal(capsys):
    assert main(["tr\x1b[2Jain"]) == 2
    assert "\x1b" not in capsys.readouterr().err


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


@pytest.mark.parametrize("words", leaves(), ids=" ".join)
def test_each_help_has_an_example_that_parses(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    said = capsys.readouterr().out
    example = said.partition("example:\n  ")[2].strip()
    assert example.startswith(f"xtuner {' '.join(words)} ")
    ran = []
    command = COMMANDS[words[0]]
    command = command.commands[words[1]] if len(words) > 1 else command
    module = f"xtuner.tools.{command.module}"
    monkeypatch.setattr(f"{module}.run", lambda args: ran.append(args))
    assert main(shlex.split(example)[1:]) == 0
    assert len(ran) == 1


def test_helps_tell_the_defaults(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    said = capsys.readouterr().out
    assert "sampling temperature, 0: greedy (default: 0.1)" in said
    assert "default: None" not in said and "default: False" not in said
    assert "default: default" not in said


@pytest.mark.parametrize("language", ["zh", "cn", "zh_CN.UTF-8"])
def test_argparse_speaks_chinese_too(language, monkeypatch, capsys):
    monkeypatch.setenv("XTUNER_LANG", language)
    monkeypatch.setenv("LANGUAGE", "fr")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    for english in ("usage:", "options:", "positional", "show this help", "example:", "default:"):
        assert english not in said
    assert main(["train"]) == 2
    assert main(["train", "c.py", "--work_dirs", "x"]) == 2
    said = capsys.readouterr().err
    assert "required" not in said and "unrecognized" not in said
    assert "--work-dir" in said
    assert os.environ["LANGUAGE"] == "fr"


def test_english_is_english_whatever_the_locale(monkeypatch, capsys):
    monkeypatch.setenv("XTUNER_LANG", "en")
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert capsys.readouterr().out.startswith("usage: xtuner train")


def test_an_unforeseen_error_is_answered_with_the_mistakes_of_the_config(tmp_path, monkeypatch):
    """Not with what is wrong with a file of data as a config."""
    config, data = tmp_path / "c.py", tmp_path / "d.json"
    config.write_text("model = dict(compile='sometimes')\n", "utf-8")
    data.write_text('{"a": 1}', "utf-8")
    found = entry_point._mistakes_in_config(["log-dataset", str(data), str(config)])
    assert found is not None and "c.py" in str(found)
    assert entry_point._mistakes_in_config(["preprocess", "arxiv", str(data), "out"]) is None
    data.write_text("[1, 2]", "utf-8")
    assert entry_point._mistakes_in_config([str(data), str(tmp_path / "none.py")]) is None
