"""Damage of files: what the cheap check sees, and what the whole one does."""

from __future__ import annotations

import os

import pytest

from xtuner.dataset.prepare import checksums
from xtuner.dataset.prepare.checksums import find_damage, write_checksums

SIZE = 1 << 20


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "SAMPLE", 1 << 10)
    (tmp_path / "data").write_bytes(bytes(range(256)) * (SIZE >> 8))
    (tmp_path / "small").write_bytes(b"{}")
    write_checksums(tmp_path)
    return tmp_path


def put(file, place, *, keep_time):
    """Change one byte of a file, whose size stays."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(b"\x00")
    time = (before.st_atime_ns, before.st_mtime_ns + (0 if keep_time else 10**9))
    os.utime(file, ns=time)


def test_nothing_is_read_whole_where_nothing_has_changed(folder, monkeypatch):
    monkeypatch.setattr(checksums, "_whole", lambda file: pytest.fail(f"{file} is read whole"))
    assert find_damage(folder) is None


def test_a_changed_file_is_read_whole(folder):
    put(folder / "data", 1500, keep_time=False)  # between two samples
    assert find_damage(folder) == "data differs"


@pytest.mark.parametrize("place", [1, SIZE // 15 - 1, SIZE - 3])
def test_samples_see_bytes_that_rot(folder, place):
    put(folder / "data", place, keep_time=True)
    assert find_damage(folder) == "data differs"


def test_what_lies_between_the_samples_is_seen_when_asked(folder):
    put(folder / "data", 1500, keep_time=True)
    assert find_damage(folder) is None
    assert find_damage(folder, whole=True) == "data differs"


def test_a_touched_file_is_whole(folder):
    os.utime(folder / "data", (1, 1))
    assert find_damage(folder) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"small": 1}', '{"small": {}}'])
def test_checksums_that_are_none(folder, content):
    (folder / checksums.CHECKSUMS).write_text(content)
    assert find_damage(folder) == f"{checksums.CHECKSUMS} differs"


def test_files_that_are_gone_or_cut(folder):
    os.truncate(folder / "data", 5)
    assert find_damage(folder) == "data differs"
    (folder / "data").unlink()
    assert find_damage(folder) == "data is missing"
    (folder / checksums.CHECKSUMS).unlink()
    assert find_damage(folder) is None
