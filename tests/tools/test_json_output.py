"""Standard output that is JSON alone, whatever else is printed."""

import argparse
import importlib
import json
import logging
import os
import subprocess
import sys

import pytest

from xtuner.entry_point import COMMANDS, main
from xtuner.tools.json_output import json_alone, print_json


def printing(words):
    """The options of a command."""
    parser = argparse.ArgumentParser()
    module = importlib.import_module(f"xtuner.tools.{COMMANDS[words].module}")
    module.add_arguments(parser)
    return parser._option_string_actions


WITH_JSON = [name for name in COMMANDS if COMMANDS[name].module and "--json" in printing(name)]


def be_loud():
    """Print as configs, libraries, C code and other programs do."""
    print("print")
    os.write(1, b"C code\n")
    subprocess.run([sys.executable, "-c", "print('program')"], check=True)
    logging.StreamHandler(sys.stdout).emit(logging.makeLogRecord({"msg": "logger"}))


def test_the_commands():
    known = {"check-cfg", "check-custom-dataset", "list-cfg", "plan", "prove", "rehearse"}
    assert set(WITH_JSON) >= known


@pytest.mark.parametrize("name", WITH_JSON)
def test_nothing_but_json(name, capfd, monkeypatch):
    """The command prints by ``print_json``; what its work prints goes to stderr."""
    module = importlib.import_module(f"xtuner.tools.{COMMANDS[name].module}")
    assert module.print_json is print_json

    def run(args):
        be_loud()
        print_json({"done": args.json})
        be_loud()
        return 0

    monkeypatch.setattr(module, "run", run)
    assert main([name, "--json"] + ["any"] * (name != "list-cfg")) == 0
    said = capfd.readouterr()
    assert json.loads(said.out) == {"done": True}
    assert all(said.err.count(what) == 2 for what in ("print", "C code", "program", "logger"))
    be_loud()
    assert "C code" in capfd.readouterr().out


def test_a_loud_config(capfd, tmp_path):
    file = tmp_path / "loud.py"
    file.write_text("print('here I am')\nmodel = dict(type='SupervisedFinetune')\n", "utf-8")
    main(["check-cfg", str(file), "--json"])
    said = capfd.readouterr()
    assert json.loads(said.out) and "here I am" in said.err


def test_after_an_error_all_is_as_before(capfd):
    with pytest.raises(KeyError), json_alone():
        raise KeyError
    be_loud()
    assert "C code" in capfd.readouterr().out


def test_numbers_that_json_does_not_have(capsys):
    print_json({"one": [float("inf"), 1.5], "other": float("nan")})
    assert json.loads(capsys.readouterr().out) == {"one": [None, 1.5], "other": None}
