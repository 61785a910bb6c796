"""One run in a work dir at a time; the lock of a run that has ended passes on."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.engine.toy import write_config
from tests.helpers.forked import wait_until
from xtuner.engine import work_dir_lock
from xtuner.engine.work_dir_lock import NAME, STALE_AFTER, locked
from xtuner.entry_point import main
from xtuner.utils.errors import UserError
from xtuner.utils.process_identity import ProcessIdentity, started


@pytest.fixture
def other():
    """Another process, which lives as long as the test."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield replace(ProcessIdentity.this(), process=process.pid, started=started(process.pid))


def write(folder, owner: ProcessIdentity, silent_for: float = 0.0):
    file = folder / NAME
    file.write_text(json.dumps(asdict(owner)))
    now = file.stat().st_mtime
    os.utime(file, (now - silent_for, now - silent_for))
    return file


def test_a_second_run_is_refused_and_the_first_one_is_named(tmp_path, other):
    file = write(tmp_path, other, silent_for=10 * STALE_AFTER)  # it lives, however busy it is
    with pytest.raises(UserError) as refused, locked(tmp_path):
        pass
    assert f"process {other.process} on {other.host}" in str(refused.value)
    assert json.loads(file.read_text()) == asdict(other)


def test_the_command_refuses_before_it_writes_anything(tmp_path, other, capsys, monkeypatch):
    config = write_config(tmp_path)
    work_dir = tmp_path / "work"
    work_dir.mkdir()
    write(work_dir, other)
    (work_dir / "iter_4.pth").write_bytes(b"of the resumed run")
    for words in ([], ["--overwrite"], ["--resume"]):
        assert main(["train", str(config), "--work-dir", str(work_dir), *words]) == 1
        assert f"process {other.process}" in capsys.readouterr().err
    names = {file.name for file in work_dir.iterdir()}
    assert names <= {NAME, work_dir_lock.GUARD, "iter_4.pth"} and "iter_4.pth" in names


def test_a_lock_that_cannot_be_removed_does_not_hide_why_the_run_ended(tmp_path, monkeypatch):
    read_only = OSError(errno.EROFS, "Read-only file system", ".run.lock")
    monkeypatch.setattr(Path, "unlink", Mock(side_effect=read_only))
    with pytest.raises(OSError, match="iter_40"), locked(tmp_path):
        raise OSError(errno.EROFS, "Read-only file system", "iter_40.pth")


def test_it_is_given_back_however_the_run_ends(tmp_path):
    with locked(tmp_path):
        assert (tmp_path / NAME).exists()
        with locked(tmp_path):  # the same process
            pass
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    assert not (tmp_path / NAME).exists()


def ended(owner: ProcessIdentity) -> list[ProcessIdentity]:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return [replace(owner, process=process.pid), replace(owner, started="1")]


@pytest.mark.parametrize("number", [0, 1], ids=["ended", "number of another process"])
def test_the_lock_of_a_dead_process_passes(tmp_path, other, number, capsys):
    write(tmp_path, ended(other)[number])
    with locked(tmp_path):
        assert json.loads((tmp_path / NAME).read_text()) == asdict(ProcessIdentity.this())
    assert "ended without giving this work dir back" in capsys.readouterr().out


def test_a_lock_whose_process_cannot_be_looked_up_passes_when_it_is_silent(
    tmp_path, other, monkeypatch, capsys
):
    """Of another machine or container, whatever its host name, or from before a restart."""
    looks = []
    monkeypatch.setattr(time, "sleep", looks.append)
    ticks = itertools.count(0.0, STALE_AFTER / 4)
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    elsewhere = replace(other, system="elsewhere")
    for owner in (elsewhere, replace(elsewhere, process=os.getpid())):
        write(tmp_path, owner)
        with locked(tmp_path):
            assert json.loads((tmp_path / NAME).read_text()) == asdict(ProcessIdentity.this())
        assert f"waiting up to {STALE_AFTER:.0f} s" in capsys.readouterr().out
    assert looks
    write(tmp_path, elsewhere, silent_for=STALE_AFTER * 2)
    with locked(tmp_path):
        assert "waiting" not in capsys.readouterr().out


def test_a_lock_that_is_touched_while_it_is_watched_is_held(tmp_path, other, monkeypatch):
    file = write(tmp_path, replace(other, system="elsewhere"), silent_for=STALE_AFTER / 2)
    monkeypatch.setattr(time, "sleep", lambda seconds: os.utime(file))
    with pytest.raises(UserError, match=f"process {other.process}"), locked(tmp_path):
        pass


def test_a_lock_that_is_given_back_while_it_is_watched_passes(tmp_path, other, monkeypatch):
    file = write(tmp_path, replace(other, system="elsewhere"))
    monkeypatch.setattr(time, "sleep", lambda seconds: file.unlink())
    with locked(tmp_path):
        assert file.exists()


def test_it_is_touched_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(work_dir_lock, "TOUCH_EVERY", 0.01)
    file = tmp_path / NAME
    with locked(tmp_path):
        os.utime(file, (0, 0))
        assert wait_until(lambda: file.stat().st_mtime > 0)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_a_damaged_lock_passes(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    with locked(tmp_path):
        pass
