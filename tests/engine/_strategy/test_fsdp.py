"""FSDP: two ranks with sharded weights compute and save what one rank with all of them does."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.helpers.tiny import make_model
from tests.parallel.workers import together
from xtuner.checkpoint.checkpoint import load_checkpoint
from xtuner.engine._strategy.fsdp import FSDPStrategy
from xtuner.engine.optim import FinetuneOptimWrapper
from xtuner.model import SupervisedFinetune
from xtuner.utils.errors import UserError

RANKS = 2


def build():
    torch.manual_seed(0)
    return SupervisedFinetune(make_model("llama"), use_activation_checkpointing=False)


def batch(rank):
    ids = torch.randint(3, 500, (1, 12), generator=torch.Generator().manual_seed(rank))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def wrapper(model):
    return FinetuneOptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-2))


def step(model, optim, rows, scale):
    for row in rows:
        (model(row)["loss"] * scale).backward()
    optim.optimizer.step()
    optim.optimizer.zero_grad()


def work(folder):
    """A step, a checkpoint and a second step; that step again, from the checkpoint."""
    rank = dist.get_rank()
    strategy = FSDPStrategy()
    model = strategy.wrap(build(), torch.device("cpu"), {})
    sharded = [type(weight) is DTensor for weight in model.state_dict().values()]
    optim = wrapper(model)
    step(model, optim, [batch(rank)], scale=1.0)
    state = {"meta": {"strategy": strategy.name}, **strategy.state_dict(model, optim, True)}
    strategy.save(Path(folder) / "iter_1.pth", state, model, optim, True)
    with strategy.full_params(model):
        first = {name: value.clone() for name, value in model.state_dict().items()}
    step(model, optim, [batch(rank + RANKS)], scale=1.0)

    again = strategy.wrap(build(), torch.device("cpu"), {})
    other = wrapper(again)
    had_optimizer = strategy.restore(load_checkpoint(Path(folder) / "iter_1.pth"), again, other)
    step(again, other, [batch(rank + RANKS)], scale=1.0)
    same = [
        torch.equal(one.full_tensor(), two.full_tensor())
        for one, two in zip(model.parameters(), again.parameters(), strict=True)
    ]
    last = {name: weight.full_tensor().detach() for name, weight in model.named_parameters()}
    return {
        "sharded": all(sharded),
        "first": first if rank == 0 else {name: value.numel() for name, value in first.items()},
        "last": last,
        "had_optimizer": had_optimizer,
        "same": all(same),
    }


@pytest.fixture(scope="module")
def found():
    with tempfile.TemporaryDirectory() as folder:
        return together(work, RANKS, folder)


@pytest.fixture(scope="module")
def alone():
    """One model that takes the rows of both ranks; FSDP averages over the ranks."""
    model = build()
    optim = wrapper(model)
    step(model, optim, [batch(0), batch(1)], scale=1 / RANKS)
    first = copy.deepcopy(model.state_dict())
    step(model, optim, [batch(2), batch(3)], scale=1 / RANKS)
    return first, dict(model.named_parameters())


def test_weights_are_sharded_and_a_step_is_that_of_one_rank(found, alone):
    assert all(rank["sharded"] for rank in found)
    for name, weight in alone[1].items():
        for rank in found:
            torch.testing.assert_close(rank["last"][name], weight.detach(), rtol=0, atol=1e-5)


def test_full_weights_are_on_the_first_rank_alone(found, alone):
    first, second = (rank["first"] for rank in found)
    for name, weight in alone[0].items():
        torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-5)
    assert set(second.values()) == {0}


def test_a_checkpoint_goes_on_to_the_bit(found):
    assert all(rank["had_optimizer"] and rank["same"] for rank in found)


def test_float16_is_refused():
    with pytest.raises(UserError, match="bfloat16 or float32"):
        FSDPStrategy(dtype="float16")


def test_optimizers_of_bitsandbytes_are_refused():
    optimizer = type("Adam8bit", (torch.optim.SGD,), {"__module__": "bitsandbytes.optim.adam"})
    model = torch.nn.Linear(2, 2)
    wrapped = FinetuneOptimWrapper(optimizer(model.parameters(), lr=0.1))
    with pytest.raises(UserError, match="Adam8bit does not work on weights sharded by FSDP"):
        FSDPStrategy().setup(model, wrapped)
