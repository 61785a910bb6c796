"""Work in forked processes: results, errors, kills, ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from xtuner.proving import children
from xtuner.utils.errors import UserError, Where


def test_what_it_returns_comes_back(tmp_path):
    log = tmp_path / "log.txt"

    def work(number: int) -> dict[str, int]:
        print("said")
        return {"twice": 2 * number, "pid": os.getpid()}

    found = children.call(work, 4, log=log)
    assert found["twice"] == 8 and found["pid"] != os.getpid()
    assert log.read_text("utf-8") == "said\n"


def test_errors_keep_message_hint_and_place(tmp_path):
    def refuse() -> None:
        raise UserError("wrong", hint="write another", where=Where("my.py", 3))

    with pytest.raises(UserError, match=r"my\.py:3: wrong") as caught:
        children.call(refuse, log=tmp_path / "log.txt")
    assert caught.value.hint == "write another"
    assert "Traceback" in (tmp_path / "log.txt").read_text("utf-8")


def test_an_unforeseen_error_is_one_line(tmp_path):
    with pytest.raises(UserError, match="ZeroDivisionError: division by zero") as caught:
        children.call(lambda: 1 / 0, log=tmp_path / "log.txt")
    assert "logs/log.txt of --keep" in str(caught.value.hint)


def test_a_killed_child_is_told(tmp_path):
    child = children.Child(lambda: os.kill(os.getpid(), signal.SIGKILL), log=tmp_path / "log.txt")
    ended = child.wait()
    assert ended.killed == signal.SIGKILL and "signal 9" in str(ended.error)


def test_a_group_ends_what_still_runs(tmp_path):
    with children.Group() as group:
        child = group.start(signal.pause, log=tmp_path / "log.txt")
    assert not child._process.is_alive()


def test_ranks_meet(tmp_path):
    def rank() -> tuple[str, str]:
        return os.environ["RANK"], os.environ["WORLD_SIZE"]

    found = children.call_together(rank, 2, log=tmp_path / "ranks.txt")
    assert found == [("0", "2"), ("1", "2")]
    assert {file.name for file in Path(tmp_path).iterdir()} == {"ranks_0.txt", "ranks_1.txt"}
