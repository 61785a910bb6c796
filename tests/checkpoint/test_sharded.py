"""Folders of torch's distributed checkpoints are read whole, and nothing in them can run."""

import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.helpers.checkpoints import RunsCode
from xtuner.checkpoint.checkpoint import load_state_dict
from xtuner.checkpoint.verify import find_corruption
from xtuner.utils.errors import UserError

WEIGHTS = {"llm.a": torch.randn(5, 3), "llm.b": torch.arange(4), "c": torch.ones(2).bfloat16()}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("under", ["state_dict", "model", None])
def test_the_weights_are_read(tmp_path, under):
    state = {under: WEIGHTS, "optimizer": {"x": torch.ones(9)}, "meta": {"iter": 3}}
    dcp.save(state if under else WEIGHTS, checkpoint_id=tmp_path / "iter_3.pth", no_dist=True)
    read = load_state_dict(tmp_path / "iter_3.pth")
    assert set(read) == set(WEIGHTS)
    for name, expected in WEIGHTS.items():
        assert read[name].dtype == expected.dtype and torch.equal(read[name], expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_hostile_metadata_is_refused(tmp_path):
    dcp.save(WEIGHTS, checkpoint_id=tmp_path / "iter_3.pth", no_dist=True)
    (tmp_path / "iter_3.pth" / ".metadata").write_bytes(pickle.dumps(RunsCode(tmp_path / "trace")))
    with pytest.raises(UserError, match=r"it asks to run posix.system. Nothing from it was run"):
        load_state_dict(tmp_path / "iter_3.pth")
    assert not (tmp_path / "trace").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tensor_is_read_when_it_is_asked_for(tmp_path):
    dcp.save(WEIGHTS, checkpoint_id=tmp_path / "iter_3.pth", no_dist=True)
    read = load_state_dict(tmp_path / "iter_3.pth")
    for part in (tmp_path / "iter_3.pth").glob("*.distcp"):
        part.unlink()
    assert set(read) == set(WEIGHTS)
    with pytest.raises(UserError, match="the folder cannot be read"):
        read["c"]


def _flip(file):
    data = bytearray(file.read_bytes())
    data[data.index(WEIGHTS["llm.a"].numpy().tobytes())] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "a flipped bit": ("distcp is damaged", lambda folder: _flip(folder / "__0_0.distcp")),
    "a file that is cut": (
        "distcp is damaged",
        lambda folder: (folder / "__0_0.distcp").write_bytes(
            (folder / "__0_0.distcp").read_bytes()[:-900]
        ),
    ),
    "a missing file": ("No such file", lambda folder: (folder / "__0_0.distcp").rename("gone")),
    "no metadata": ("No such file", lambda folder: (folder / ".metadata").unlink()),
    "other metadata": ("cannot be read", lambda f: (f / ".metadata").write_bytes(b"x" * 50)),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_without_a_manifest(tmp_path, monkeypatch, kind):
    folder = tmp_path / "iter_3.pth"
    dcp.save(WEIGHTS | {"numbers": [1, 2]}, checkpoint_id=folder, no_dist=True)
    assert find_corruption(folder) is None
    said, damage = DAMAGES[kind]
    monkeypatch.chdir(tmp_path)
    damage(folder)
    assert said in find_corruption(folder)
