"""What is done for a run before it starts: compiled where that pays, said in words."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from xtuner.engine.runner.warmup import prepare_device
from xtuner.model.backends.cpu.kernels import Kernel


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    monkeypatch.setattr(Kernel, "compiled", False)


def runner_of(compiles, max_iters, device="cpu"):
    """A run of ``max_iters`` micro-batches of 2 rows of 500 tokens, of a model of 1,000 weights."""
    model = nn.Linear(1000, 1, bias=False)
    model.compiles = compiles
    dataset = type("Rows", (dict,), {"column_names": ["length"]})(length=[400, 600])
    loader = SimpleNamespace(dataset=dataset, batch_size=2)
    loop = SimpleNamespace(dataloader=loader, max_iters=max_iters)
    return SimpleNamespace(model=model, device=torch.device(device), train_loop=loop)


@pytest.mark.parametrize(
    ("compiles", "max_iters", "expected"),
    # 6 x 1,000 weights x 1,000 tokens a micro-batch: 3e14 operations are 5e7 micro-batches
    [
        ("auto", 49_000_000, False),
        ("auto", 51_000_000, True),
        (True, 1, True),
        (False, 10**9, False),
    ],
)
def test_a_run_is_compiled_where_that_pays(compiles, max_iters, expected):
    said = prepare_device(runner_of(compiles, max_iters))
    assert Kernel.compiled is expected
    assert ("compiled" in said) is expected
    assert re.fullmatch("1 thread|[0-9]+ threads", said[0])


def test_without_known_lengths_auto_does_not_compile():
    runner = runner_of("auto", 10**9)
    runner.train_loop.dataloader.dataset = [1, 2, 3]
    prepare_device(runner)
    assert not Kernel.compiled


def test_one_run_leaves_nothing_to_the_next():
    prepare_device(runner_of(True, 1))
    prepare_device(runner_of(False, 1))
    assert not Kernel.compiled


def test_a_gpu_needs_nothing():
    assert prepare_device(runner_of(True, 1, device="cuda")) == []
    assert not Kernel.compiled
