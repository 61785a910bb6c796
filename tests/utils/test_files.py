"""Files and folders are complete or not there, on disk too."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from xtuner.utils.files import restore_killed, write_text, written_aside
from xtuner.utils.process_identity import ProcessIdentity


@pytest.fixture
def calls(monkeypatch):
    """Which files are flushed and renamed, in order."""
    made: list[tuple[str, str]] = []
    opened: dict[int, str] = {}
    original_open, original_fsync = os.open, os.fsync

    def open_(path, *args, **kwargs):
        descriptor = original_open(path, *args, **kwargs)
        opened[descriptor] = Path(path).name
        return descriptor

    def fsync(descriptor):
        made.append(("fsync", opened[descriptor]))
        original_fsync(descriptor)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("replace", "rename"):
        original = getattr(Path, name)

        def move(self, target, original=original):
            made.append(("rename", Path(target).name))
            return original(self, target)

        monkeypatch.setattr(Path, name, move)
    return made


def test_a_file_is_on_disk_before_its_name_and_its_name_before_the_end(tmp_path, calls):
    folder = tmp_path / "folder"
    with written_aside(folder / "a.txt") as aside:
        aside.write_text("new")
    assert calls == [("fsync", "a.txt"), ("rename", "a.txt"), ("fsync", "folder")]


def test_all_files_of_a_folder_are_on_disk_before_its_name(tmp_path, calls):
    with written_aside(tmp_path / "model") as aside:
        (aside / "inner").mkdir(parents=True)
        for name in ("a", "inner/b"):
            (aside / name).write_text(name)
    renamed = calls.index(("rename", "model"))
    assert {("fsync", "a"), ("fsync", "b"), ("fsync", "model")} <= set(calls[:renamed])
    assert calls[renamed + 1 :] == [("fsync", tmp_path.name)]


def write_folder(target: Path, text: str) -> None:
    with written_aside(target) as aside:
        aside.mkdir()
        (aside / "a").write_text(text)


def test_a_folder_is_replaced(tmp_path):
    write_folder(tmp_path / "model", "old")
    write_folder(tmp_path / "model", "new")
    assert (tmp_path / "model" / "a").read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    write_folder(tmp_path / "model", "old")
    original = Path.rename

    def rename(self, target):
        if self.name == "model" and Path(target) == tmp_path / "model":
            raise OSError("no")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="no"):
        write_folder(tmp_path / "model", "new")
    assert (tmp_path / "model" / "a").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_nothing_is_left_of_a_block_that_raises(tmp_path):
    with pytest.raises(RuntimeError), written_aside(tmp_path / "a") as aside:
        aside.write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("inner", ["", "/config.json"])
@pytest.mark.parametrize("stream", [True, False])
def test_an_error_names_the_file_and_not_the_one_beside_it(tmp_path, inner, stream):
    """A stream's error names none."""
    with pytest.raises(OSError, match="full") as raised, written_aside(tmp_path / "a") as aside:
        name = None if stream else f"{aside}{inner}"
        raise OSError(errno.ENOSPC, "full", name)
    assert raised.value.filename == f"{tmp_path / 'a'}{'' if stream else inner}"


def test_an_error_of_something_else_keeps_its_file(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, written_aside(tmp_path / "a"):
        (tmp_path / "b").read_text()
    assert raised.value.filename == str(tmp_path / "b")


THIS = ProcessIdentity.this()


def left_by(folder: Path, identity: ProcessIdentity) -> Path:
    """What a process that writes ``model``, or was killed while it did, has there."""
    aside = folder / f".model.{identity.name()}.ab12"
    (aside / "model").mkdir(parents=True)
    (aside / "model" / "a").write_text("half")
    return aside


def test_what_a_killed_process_left_is_removed_and_what_others_write_is_not(tmp_path):
    number_of_another = replace(THIS, started="1")
    dead = left_by(tmp_path, number_of_another)
    kept = [left_by(tmp_path, THIS), left_by(tmp_path, replace(number_of_another, system="abc"))]
    kept += [tmp_path / ".model.old", tmp_path / ".model.1-2.x"]
    for folder in kept[2:]:
        folder.mkdir()
    write_folder(tmp_path / "model", "new")
    assert not dead.exists()
    assert all(folder.is_dir() for folder in kept)
    assert (tmp_path / "model" / "a").read_text() == "new"


def test_what_another_container_left_or_writes_is_named(tmp_path, capsys):
    """It cannot be known whether it runs: a boot or a namespace of numbers is not this one's."""
    left_by(tmp_path, THIS)
    write_folder(tmp_path / "model", "new")
    assert not capsys.readouterr().err
    foreign = left_by(tmp_path, replace(THIS, system="abc"))
    os.utime(foreign / "model" / "a", (0, 0))
    (foreign / "model" / "b").write_bytes(bytes(1_500_000))
    write_folder(tmp_path / "model", "newer")
    write_folder(tmp_path / "other", "new")
    said = capsys.readouterr().err
    assert said.count(str(foreign)) == 1 and f"writes {tmp_path / 'model'} any more" in said
    assert "(1.5 MB, last written 20" in said and "19" not in said.partition("written")[2][:8]
    assert foreign.is_dir()


def test_killed_between_two_renames_nothing_is_lost(tmp_path, capsys):
    aside = left_by(tmp_path, replace(THIS, started="1"))
    (aside / "replaced").mkdir()
    with pytest.raises(RuntimeError), written_aside(tmp_path / "model"):
        raise RuntimeError
    assert (tmp_path / "model" / "a").read_text() == "half"
    assert (aside / "replaced").is_dir()
    said = capsys.readouterr().err
    assert str(tmp_path / "model") in said and str(aside / "replaced") in said
    write_folder(tmp_path / "model", "new")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert not capsys.readouterr().err


def test_folders_made_for_a_file_go_with_it(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(RuntimeError), written_aside(tmp_path / "there" / "new" / "p" / "a"):
        raise RuntimeError
    assert [entry.name for entry in tmp_path.rglob("*")] == ["there"]
    with pytest.raises(RuntimeError), written_aside(tmp_path / "new" / "p" / "a"):
        (tmp_path / "new" / "of_another").touch()
        raise RuntimeError
    assert {entry.name for entry in tmp_path.rglob("*")} == {"there", "new", "of_another"}


def test_a_folder_that_cannot_be_put_in_place_stays(tmp_path, monkeypatch, capsys):
    aside = left_by(tmp_path, replace(THIS, started="1"))
    (aside / "replaced").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", Mock(side_effect=PermissionError))
        restore_killed(tmp_path / "model")
    assert (aside / "model" / "a").is_file() and (aside / "replaced").is_dir()
    restore_killed(tmp_path / "nowhere" / "model")
    assert not capsys.readouterr().err


def test_a_process_that_is_killed_leaves_its_name(tmp_path):
    code = "import os, sys; from xtuner.utils.files import written_aside\n"
    code += "with written_aside(sys.argv[1]) as aside: aside.mkdir(); os.kill(os.getpid(), 9)"
    target = tmp_path / "model"
    killed = subprocess.run([sys.executable, "-c", code, str(target)])
    assert killed.returncode == -9 and len(list(tmp_path.iterdir())) == 1
    write_folder(target, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_pipe_or_device_is_written_to_and_never_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    write_text(pipe, "said")
    assert os.read(reader, 10) == b"said" and pipe.is_fifo()
    os.close(reader)
    with pytest.raises(OSError, match="a device or a pipe"), written_aside(pipe):
        pass
    assert pipe.is_fifo()
