"""The way of a config from ``train()`` to the runner: few files, and hardly ever back to one.

What is followed is the config itself, in each of its three forms: ``ConfigDocument``, its text
(``ConfigSource``) and its values (``mmengine.Config``). A function is on the way when it is given
one of them or gives one back. The modules of these forms (``document.py``, ``source.py``,
``values.py``) are left out: reading a field of the config is no step on its way.

A stop is a visit to a file: functions are listed in the order of their first calls, and each run of
functions of one file is one stop. A return is a stop in a file that the way had left before. So
``load.py, options.py, load.py`` are three stops and one return. Functions that get no config but
only a part of it (a rule's finding, a value to be written) are no stops.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from types import FrameType

import pytest
from mmengine.config import Config

import xtuner
from xtuner.config.document import ConfigDocument
from xtuner.config.source import ConfigSource
from xtuner.engine import train as start

PACKAGE = Path(xtuner.__file__).parent
FOLLOWED = tuple(str(PACKAGE / name) + os.sep for name in ("config", "engine"))
FORMS = (ConfigDocument, ConfigSource, Config)
MODULES_OF_FORMS = {f"config/{name}.py" for name in ("document", "source", "values")}
OPTIONS = ["lr=1e-5", "model.lora.r=8"]


class Arrived(Exception):
    """The config has come to the runner."""


class Recorder:
    """A profile function that notes each first call of a function that a config passes through."""

    def __init__(self) -> None:
        self.calls: dict[tuple[str, str], bool] = {}

    def __call__(self, frame: FrameType, event: str, returned: object) -> None:
        file = frame.f_code.co_filename
        if event not in ("call", "return") or not file.startswith(FOLLOWED):
            return
        name = str(Path(file).relative_to(PACKAGE))
        if name in MODULES_OF_FORMS or "<" in frame.f_code.co_name:
            return
        key = (name, frame.f_code.co_qualname)
        count = frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount
        given = [frame.f_locals.get(each) for each in frame.f_code.co_varnames[:count]]
        passes = any(isinstance(value, FORMS) for value in [*given, returned])
        self.calls[key] = self.calls.get(key, False) or passes

    def stops(self) -> list[str]:
        """The files, in order."""
        files = [file for (file, _), passes in self.calls.items() if passes]
        return [file for file, _ in itertools.groupby(["engine/train.py", *files])]


@pytest.fixture
def stops(tmp_path, monkeypatch) -> list[str]:
    def arrived(_: Config) -> None:
        raise Arrived

    monkeypatch.setattr(start, "build_training_runner", arrived)
    monkeypatch.setattr(start, "_require_models", lambda document: None)
    recorder = Recorder()
    before = sys.getprofile()
    sys.setprofile(recorder)
    try:
        start.train("internlm2_chat_7b_qlora_alpaca_e3", work_dir=str(tmp_path), options=OPTIONS)
    except Arrived:
        pass
    finally:
        sys.setprofile(before)
    return recorder.stops()


def test_the_way_is_short(stops):
    returns = len(stops) - len(set(stops))
    assert len(stops) < 25, "\n".join(stops)
    assert returns < 5, "\n".join(stops)


def test_the_stages_come_in_their_order(stops):
    stages = ["load", "override", "check/checker", "adapt/adapter", "dump"]
    firsts = [stops.index(f"config/{stage}.py") for stage in stages]
    assert firsts == sorted(firsts)


def test_stages_give_a_new_document_and_leave_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setattr("xtuner.config.adapt.machine._cpu_has_bf16", lambda: False)  # a note
    from xtuner.config.adapt.adapter import RunOptions, adapt
    from xtuner.config.dump import spelled_out
    from xtuner.config.load import load
    from xtuner.config.override import override

    loaded = load("internlm2_chat_7b_qlora_alpaca_e3")
    text = spelled_out(loaded.config)
    overridden = override(loaded, OPTIONS)
    assert (loaded.overrides, overridden.overrides) == ((), tuple(OPTIONS))
    assert overridden.original is loaded.source and overridden.values["lr"] == 1e-5
    assert spelled_out(loaded.config) == text
    before = spelled_out(overridden.config)
    adapted = adapt(overridden, RunOptions(work_dir=str(tmp_path), seed=3))
    assert (adapted.values["work_dir"], adapted.values["randomness"]["seed"]) == (str(tmp_path), 3)
    assert spelled_out(overridden.config) == before
    assert adapted.notes and not overridden.notes
