"""DeepSpeed folders are read to the bit: laid out by hand here, and by DeepSpeed where it is."""

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.helpers.forked import run_ranks
from xtuner.checkpoint.checkpoint import load_state_dict
from xtuner.utils.errors import UserError

SHAPES = [{"a.weight": (13, 8), "b.weight": (5, 13)}, {"a.bias": (13,), "n.bias": (5,), "s": ()}]
RANKS = 12  # more than ten, so that order by text would be wrong


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    named = {name: torch.randn(shape) for group in SHAPES for name, shape in group.items()}
    return named | {"frozen": torch.randn(7, 3)}


@pytest.fixture
def deepspeed_classes(monkeypatch):
    """Classes by DeepSpeed's names, to be pickled."""
    module = types.ModuleType("deepspeed.runtime.fp16.loss_scaler")
    module.LossScaler = type("LossScaler", (), {"__module__": module.__name__})
    with monkeypatch.context() as patch:
        for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16", module.__name__):
            patch.setitem(sys.modules, name, module)
        yield module


def padded(flat: torch.Tensor, parts: int) -> list[torch.Tensor]:
    share = -(-flat.numel() // parts)
    return list(torch.cat([flat, torch.zeros(share * parts - flat.numel())]).split(share))


def write_zero_2(folder: Path, scaler: object) -> None:
    named = weights()
    folder.mkdir(parents=True)
    half = {name: value.bfloat16() for name, value in named.items()}
    model = {
        "module": half,
        "param_shapes": [{n: torch.Size(s) for n, s in group.items()} for group in SHAPES],
        "frozen_param_shapes": {"frozen": torch.Size((7, 3))},
        "shared_params": {"tied": "a.weight"},
        "mp_world_size": 1,
    }
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    groups = [torch.cat([named[name].flatten() for name in group]) for group in SHAPES]
    for rank in range(RANKS):
        part = {
            "single_partition_of_fp32_groups": [padded(g, RANKS)[rank].clone() for g in groups],
            "partition_count": [RANKS, RANKS],
            "loss_scaler": scaler,
        }
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": part}, folder / name)


def write_zero_3(folder: Path, scaler: object) -> None:
    named = weights()
    folder.mkdir(parents=True)
    for rank in range(RANKS):
        model = {
            "module": {name: torch.empty(0) for name in named},
            "param_shapes": [{n: torch.Size(s) for n, s in group.items()} for group in SHAPES],
            "frozen_param_shapes": {"frozen": torch.Size((7, 3))},
            "frozen_param_fragments": {"frozen": padded(named["frozen"].flatten(), RANKS)[rank]},
        }
        torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        flat = [
            torch.cat([padded(named[name].flatten(), RANKS)[rank] for name in group])
            for group in SHAPES
        ]
        part = {"fp32_flat_groups": flat, "partition_count": RANKS, "loss_scaler": scaler}
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": part}, folder / name)


@pytest.mark.parametrize("write", [write_zero_2, write_zero_3])
def test_the_parts_are_put_together_to_the_bit(tmp_path, deepspeed_classes, write):
    write(tmp_path / "iter_4.pth", deepspeed_classes.LossScaler())
    read = load_state_dict(tmp_path / "iter_4.pth")
    expected = weights()
    trained = [name for group in SHAPES for name in group]
    assert set(read) - {"tied"} == set(expected)
    for name in trained:
        assert torch.equal(read[name], expected[name]), name
    frozen = expected["frozen"].bfloat16() if write is write_zero_2 else expected["frozen"]
    assert torch.equal(read["frozen"], frozen)
    if write is write_zero_2:
        assert torch.equal(read["tied"], expected["a.weight"])


def test_the_folder_above_is_read_through_its_latest_file(tmp_path, deepspeed_classes):
    write_zero_2(tmp_path / "iter_4.pth", deepspeed_classes.LossScaler())
    (tmp_path / "latest").write_text("iter_4.pth")
    assert torch.equal(load_state_dict(tmp_path)["a.bias"], weights()["a.bias"])


def test_a_missing_rank_is_said(tmp_path, deepspeed_classes):
    write_zero_2(tmp_path / "iter_4.pth", deepspeed_classes.LossScaler())
    next((tmp_path / "iter_4.pth").glob("*rank_7_*")).unlink()
    with pytest.raises(UserError, match=r"written by 12 ranks, .* of 11"):
        load_state_dict(tmp_path / "iter_4.pth")


def test_parts_that_are_too_small_are_said(tmp_path, deepspeed_classes):
    write_zero_2(tmp_path / "iter_4.pth", deepspeed_classes.LossScaler())
    for file in (tmp_path / "iter_4.pth").glob("*optim_states.pt"):
        part = torch.load(file, weights_only=False)  # written above
        flat = part["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        flat[0] = flat[0][:3].clone()
        torch.save(part, file)
    with pytest.raises(UserError, match="169 elements expected, 36 found"):
        load_state_dict(tmp_path / "iter_4.pth")


def test_without_the_optimizer_the_training_dtype_is_read(tmp_path, deepspeed_classes):
    write_zero_2(tmp_path / "iter_4.pth", deepspeed_classes.LossScaler())
    for file in (tmp_path / "iter_4.pth").glob("*optim_states.pt"):
        file.unlink()
    read = load_state_dict(tmp_path / "iter_4.pth")
    assert torch.equal(read["a.weight"], weights()["a.weight"].bfloat16())


def test_a_hostile_part_is_refused(tmp_path):
    class RunsCode:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'trace'}",)

    write_zero_2(tmp_path / "iter_4.pth", RunsCode())
    with pytest.raises(UserError, match="asks to run"):
        load_state_dict(tmp_path / "iter_4.pth")
    assert not (tmp_path / "trace").exists()


def test_a_folder_without_a_checkpoint_is_said(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        load_state_dict(tmp_path)


TRAIN = """
import os, sys, torch, deepspeed
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
# gloo takes the place of a C++ extension that would be compiled, which takes minutes.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
for stage in (1, 2, 3):
    folder = os.path.join(sys.argv[1], str(stage))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 13), torch.nn.Linear(13, 5, bias=False))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    config = dict(train_micro_batch_size_per_gpu=2, zero_optimization=dict(stage=stage),
                  bf16=dict(enabled=True), zero_allow_untrusted_optimizer=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    torch.manual_seed(engine.global_rank)
    for _ in range(2):
        engine.backward(engine(torch.randn(2, 8, dtype=torch.bfloat16)).pow(2).sum())
        engine.step()
    engine.save_checkpoint(folder, tag="iter_2.pth")
    if engine.global_rank == 0:
        truth = get_fp32_state_dict_from_zero_checkpoint(folder, tag="iter_2.pth")
        torch.save({name: value.clone() for name, value in truth.items()}, folder + "/truth.pt")
"""


# One test: the processes go through all stages.
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
def test_what_deepspeed_wrote_is_read_as_deepspeed_reads_it(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    run_ranks(2, script, tmp_path, DS_ACCELERATOR="cpu")
    for stage in (1, 2, 3):
        truth = torch.load(tmp_path / f"{stage}" / "truth.pt", weights_only=True)
        read = load_state_dict(tmp_path / f"{stage}" / "iter_2.pth")
        for name, expected in truth.items():
            assert torch.equal(read[name], expected), f"stage {stage}, {name}"
