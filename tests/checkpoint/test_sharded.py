"""Folders of torch's distributed checkpoints are read whole, and nothing in them can run."""

import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.helpers.checkpoints import RunsCode
from xtuner.checkpoint.checkpoint import load_state_dict
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
