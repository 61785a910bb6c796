"""Each file of a checkpoint is hashed once, by one of the ranks."""

import json

import pytest
import torch

from xtuner.checkpoint import manifest
from xtuner.checkpoint.checkpoint import load_checkpoint
from xtuner.checkpoint.folder import save_folder
from xtuner.checkpoint.manifest import write_manifest
from xtuner.checkpoint.resume import checkpoint_to_resume
from xtuner.checkpoint.verify import find_corruption
from xtuner.utils.errors import UserError


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "iter_4.pth"

    def write_shard(aside):
        for number in range(5):
            (aside / f"shard_{number}").write_bytes(bytes([number]) * 100 * (number + 1))

    save_folder(target, {"meta": {"iter": 4}}, write_shard)
    return target


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that are hashed."""
    names: list[str] = []
    original = manifest.sha256
    monkeypatch.setattr(manifest, "sha256", lambda f: names.append(f.name) or original(f))
    return names


def test_the_ranks_share_the_files(folder, hashed):
    assert [find_corruption(folder, rank=rank, world_size=3) for rank in range(3)] == [None] * 3
    assert sorted(hashed) == sorted(file.name for file in folder.iterdir())


def test_one_of_the_ranks_finds_a_changed_byte(folder):
    file = folder / "shard_3"
    file.write_bytes(b"x" + file.read_bytes()[1:])
    found = [find_corruption(folder, rank=rank, world_size=3) for rank in range(3)]
    assert [each is None for each in found].count(False) == 1
    assert "content of iter_4.pth/shard_3 has changed" in next(filter(None, found))


def test_all_ranks_find_a_missing_or_short_file(folder):
    (folder / "shard_0").write_bytes(b"")
    assert all(find_corruption(folder, rank=rank, world_size=2) for rank in range(2))
    (folder / "shard_0").unlink()
    assert "shard_0 is missing" in find_corruption(folder, rank=1, world_size=2)


def test_a_folder_with_a_bad_manifest_is_read(folder, capsys):
    manifest = folder.with_name("iter_4.pth.json")
    entries = json.loads(manifest.read_text())
    entries["files"].popitem()  # a file that it says nothing of
    manifest.write_text(json.dumps(entries))
    assert find_corruption(folder) is None
    assert "the checkpoint itself is read" in capsys.readouterr().err
    run_file = folder / "run.pth"
    run_file.write_bytes(run_file.read_bytes()[:-40])
    assert "run.pth" in find_corruption(folder)


def test_only_the_first_rank_tries_to_load_a_file_without_a_manifest(tmp_path):
    file = tmp_path / "iter_4.pth"
    file.write_bytes(b"nothing")
    assert find_corruption(file, rank=0, world_size=2)
    assert find_corruption(file, rank=1, world_size=2) is None


@pytest.mark.parametrize("asked", [True, "path"])
def test_resuming_hashes_each_file_once(folder, hashed, asked):
    found = checkpoint_to_resume(folder.parent, asked is True or str(folder))
    assert found == folder
    load_checkpoint(found, verify=False)
    assert len(hashed) == len(list(folder.iterdir()))


def test_a_damaged_path_is_refused_when_it_is_chosen(tmp_path):
    file = tmp_path / "iter_4.pth"
    torch.save({"meta": {"iter": 4}}, file)
    write_manifest(file, {"iter": 4})
    file.write_bytes(b"x" + file.read_bytes()[1:])
    with pytest.raises(UserError, match="cannot be used"):
        checkpoint_to_resume(tmp_path, str(file))
