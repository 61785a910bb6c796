"""Files of torch.save: read as data only, and errors of the disk are explained."""

import errno
import pickle
from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch.distributed.checkpoint.api import CheckpointException

from tests.helpers.checkpoints import RunsCode, state
from xtuner.checkpoint import checkpoint, io
from xtuner.checkpoint.checkpoint import (
    find_corruption,
    find_latest,
    load_checkpoint,
    load_state_dict,
    save_checkpoint,
)
from xtuner.utils.errors import UserError


@pytest.mark.parametrize("place", ["state_dict", "meta", "message_hub"])
def test_a_hostile_checkpoint_is_refused_and_runs_nothing(tmp_path, place):
    trace = tmp_path / "trace"
    bad = state()
    bad[place] = {"x": RunsCode(trace)}
    torch.save(bad, tmp_path / "iter_4.pth")
    for read in (load_checkpoint, load_state_dict):
        with pytest.raises(UserError, match=r"asks to run .*system.* nothing from it was run"):
            read(tmp_path / "iter_4.pth")
    assert find_latest(tmp_path, report=lambda line: None) is None
    assert not trace.exists()


def test_getattr_in_a_checkpoint_reaches_nothing(tmp_path):
    class Reaches:
        def __reduce__(self):
            return getattr, (HistoryBuffer, "register_statistics")

    torch.save({"meta": {"x": Reaches()}, "state_dict": {}}, tmp_path / "iter_1.pth")
    assert load_checkpoint(tmp_path / "iter_1.pth")["meta"]["x"] is None


def test_a_bare_pickle_is_refused(tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "iter_1.pth").write_bytes(pickle.dumps(RunsCode(trace), protocol=2))
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "iter_1.pth")
    assert not trace.exists()


class FullDisk:
    """A stream on a disk that takes only so many bytes."""

    def __init__(self, stream, room: int) -> None:
        self.stream = stream
        self.room = room

    def write(self, data) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.stream.write(data)

    def flush(self) -> None:
        self.stream.flush()


def test_a_full_disk_leaves_the_good_one_and_no_rubbish(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "iter_4.pth", state(4))
    whole = checkpoint._HashingWriter
    monkeypatch.setattr(checkpoint, "_HashingWriter", lambda s: whole(FullDisk(s, 3000)))
    with pytest.raises(UserError, match="No space left on device") as caught:
        save_checkpoint(tmp_path / "iter_4.pth", state(4))
    assert "--work-dir" in caught.value.hint and "--resume" in caught.value.hint
    assert sorted(file.name for file in tmp_path.iterdir()) == ["iter_4.pth", "iter_4.pth.json"]
    assert find_corruption(tmp_path / "iter_4.pth") is None


def test_a_read_only_folder_is_said(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("xtuner.utils.files.tempfile.mkdtemp", refuse)  # root may write anywhere
    with pytest.raises(UserError, match=r"could not be written: Permission denied"):
        save_checkpoint(tmp_path / "iter_4.pth", state())


def of_archive():
    return RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


def of_ranks(error):
    return CheckpointException("ranks", {1: (error, None)})


def while_handling(error):
    other = of_archive()
    other.__context__ = error
    return other


FULL = OSError(errno.ENOSPC, "No space left on device")
AS_LIBRARIES_SAY = {
    "stream": while_handling(FULL),
    "archive": of_archive(),
    "ranks": of_ranks(FULL),
    "archive of a rank": of_ranks(of_archive()),
}


@pytest.mark.parametrize("error", AS_LIBRARIES_SAY.values(), ids=AS_LIBRARIES_SAY)
def test_a_full_disk_is_recognized_however_a_library_says_it(tmp_path, error, monkeypatch):
    monkeypatch.setattr(io.shutil, "disk_usage", lambda folder: SimpleNamespace(free=9))
    said = "No space left on device"
    target = tmp_path / "iter_4.pth"
    with pytest.raises(UserError, match=said) as caught, io.explained_write_failure(target):
        raise error
    assert "0 MB are free" in caught.value.hint


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), of_ranks(ValueError("no"))])
def test_other_errors_of_libraries_stay_as_they_are(tmp_path, error):
    with pytest.raises(type(error)), io.explained_write_failure(tmp_path / "iter_4.pth"):
        raise error


def test_where_space_is_left_files_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(io.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 40))
    with pytest.raises(UserError) as caught, io.explained_write_failure(tmp_path / "iter_4.pth"):
        raise FULL
    assert "df -i" in caught.value.hint
