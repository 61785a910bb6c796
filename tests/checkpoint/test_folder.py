"""Killed at any moment while a folder is replaced, the run finds the old or the new checkpoint."""

import errno
from pathlib import Path

import pytest

from xtuner.checkpoint import folder
from xtuner.checkpoint.checkpoint import find_latest, load_checkpoint, remove_leftovers
from xtuner.checkpoint.folder import save_folder
from xtuner.checkpoint.resume import checkpoint_to_resume
from xtuner.checkpoint.verify import find_corruption
from xtuner.utils.errors import UserError


class Killed(BaseException):
    """Not an error that anything handles."""


STEPS = ("unlink", "rename", "replace", "rmtree")


def save(target: Path, step: int) -> None:
    def write_shard(aside: Path) -> None:
        (aside / "shard").write_text(f"weights of {step}")

    save_folder(target, {"meta": {"iter": 4, "step": step}}, write_shard)


def kill_at(monkeypatch, number: int) -> list[str]:
    """Stop before the change of the file system with this number while it is put in its place."""
    done: list[str] = []
    counting = [False]

    def counted(name, original):
        def call(*args, **kwargs):
            if counting[0]:
                if len(done) == number:
                    raise Killed(name)
                done.append(name)
            return original(*args, **kwargs)

        return call

    for name in ("unlink", "rename", "replace"):
        monkeypatch.setattr(Path, name, counted(name, getattr(Path, name)))
    monkeypatch.setattr(folder.shutil, "rmtree", counted("rmtree", folder.shutil.rmtree))
    original = folder.finish_interrupted

    def finish(hidden):
        counting[0] = True
        original(hidden)

    monkeypatch.setattr(folder, "finish_interrupted", finish)
    return done


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("first", [True, False])
def test_killed_between_any_two_renames_nothing_is_lost(tmp_path, monkeypatch, number, first):
    target = tmp_path / "iter_4.pth"
    if not first:
        save(target, 1)
    with monkeypatch.context() as patched:
        kill_at(patched, number)
        try:
            save(target, 2)
        except Killed:
            pass
        else:
            assert number == 4 or first  # all changes were made
    assert checkpoint_to_resume(tmp_path, True) == target
    assert load_checkpoint(target)["meta"]["step"] == 2
    assert (target / "shard").read_text() == "weights of 2"
    assert find_corruption(target) is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["iter_4.pth", "iter_4.pth.json"]


def test_killed_while_it_is_written_the_old_one_stays(tmp_path):
    target = tmp_path / "iter_4.pth"
    save(target, 1)

    def killed(aside):
        (aside / "shard").write_text("half")
        raise Killed

    with pytest.raises(Killed):
        save_folder(target, {"meta": {"iter": 4, "step": 2}}, killed)
    remove_leftovers(tmp_path)
    assert find_latest(tmp_path) == target
    assert load_checkpoint(target)["meta"]["step"] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["iter_4.pth", "iter_4.pth.json"]


def test_on_a_full_disk_the_old_one_stays_and_the_half_goes(tmp_path):
    target = tmp_path / "iter_4.pth"
    save(target, 1)

    def full(aside):
        (aside / "shard").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        save_folder(target, {"meta": {"iter": 4, "step": 2}}, full)
    assert load_checkpoint(target)["meta"]["step"] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["iter_4.pth", "iter_4.pth.json"]
