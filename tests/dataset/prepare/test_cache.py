"""The cache of prepared data: damage is noticed and repaired, old entries can be deleted."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from datasets import Dataset
from filelock import FileLock

from xtuner.dataset.prepare import cache
from xtuner.dataset.prepare.checksums import CHECKSUMS
from xtuner.entry_point import main
from xtuner.utils.errors import UserError

ROWS = [{"input_ids": [1, 2, number]} for number in range(50)]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path / "datasets"


class Writes:
    """Writes the rows, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, folder: Path) -> None:
        self.count += 1
        Dataset.from_list(ROWS).save_to_disk(str(folder))


def arrow(folder: Path) -> Path:
    return next(folder.glob("*.arrow"))


def halved(folder: Path) -> None:
    os.truncate(arrow(folder), arrow(folder).stat().st_size // 2)


def changed(folder: Path) -> None:
    with arrow(folder).open("r+b") as stream:
        stream.seek(200)
        stream.write(b"\x7f" * 64)


DAMAGES = {
    "half of the table": halved,
    "64 bytes changed": changed,
    "no table": lambda folder: arrow(folder).unlink(),
    "no state.json": lambda folder: (folder / "state.json").unlink(),
    "empty state.json": lambda folder: (folder / "state.json").write_text(""),
    "broken checksums": lambda folder: (folder / CHECKSUMS).write_text("{"),
    "an older entry, half deleted": lambda folder: [
        (folder / name).unlink() for name in (CHECKSUMS, "state.json")
    ],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_made_again_and_that_is_said(damage, home, capsys):
    write = Writes()
    cache.prepared_once("k", write)
    assert list(cache.prepared_once("k", write)) == ROWS
    assert write.count == 1
    assert capsys.readouterr().err == ""
    damage(home / "k")
    assert list(cache.prepared_once("k", write)) == ROWS
    assert write.count == 2
    assert f"{home / 'k'}: this cached dataset is damaged" in capsys.readouterr().err
    assert list(cache.prepared_once("k", write)) == ROWS
    assert write.count == 2


def test_an_entry_of_an_earlier_version_is_used(home):
    write = Writes()
    cache.prepared_once("k", write)
    (home / "k" / CHECKSUMS).unlink()
    assert list(cache.prepared_once("k", write)) == ROWS
    assert write.count == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_named(number, home):
    def write(folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    with pytest.raises(UserError) as caught:
        cache.prepared_once("k", write)
    assert caught.value.where.file == str(home)
    assert "XTUNER_CACHE" in caught.value.hint
    assert not [each for each in home.iterdir() if each.is_dir()]


def test_other_errors_of_the_preparation_stay_what_they_are():
    def write(folder: Path) -> None:
        raise OSError(errno.EIO, "input/output error", "rows.jsonl")

    with pytest.raises(OSError, match="input/output"):
        cache.prepared_once("k", write)


def test_ls_and_prune(home, capsys):
    for key in ("old", "new", "busy"):
        cache.prepared_once(key, Writes())
    for key in ("old", "busy"):
        os.utime(home / key, (time.time() - 40 * 86400,) * 2)
    assert main(["cache", "ls"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == str(home)
    assert [line.split()[0] for line in shown.splitlines()[1:]][-1] == "new"
    assert "40 day(s)" in shown
    with FileLock(f"{home / 'busy'}.lock"):
        assert main(["cache", "prune"]) == 1
    assert f"in use: {home / 'busy'}" in capsys.readouterr().out
    assert sorted(each.name for each in home.iterdir() if each.is_dir()) == ["busy", "new"]
    cache.prepared_once("busy", Writes())  # used again
    assert main(["cache", "prune"]) == 0
    assert "deleted 0 entries" in capsys.readouterr().out
    assert main(["cache", "prune", "--days", "0"]) == 0
    assert not [each for each in home.iterdir() if each.is_dir()]
    assert main(["cache", "ls"]) == 0


def test_verify_reads_everything(home, capsys):
    cache.prepared_once("k", Writes())
    assert main(["cache", "verify"]) == 0
    assert "k  " in capsys.readouterr().out
    changed(home / "k")
    assert main(["cache", "verify"]) == 1
    assert "differs" in capsys.readouterr().out
