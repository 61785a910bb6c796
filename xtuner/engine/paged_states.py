"""bitsandbytes' optimizers on a GPU: steps without waits, and paged states that resume as such."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MODULE = "bitsandbytes.optim.optimizer"
STATES = ("state1", "state2")
PAGED = "is_paged"
"""What bitsandbytes calls the mark of a tensor in memory that the GPU and the CPU share."""


def is_of_bitsandbytes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is one of bitsandbytes', without importing that."""
    module = sys.modules.get(MODULE)
    return module is not None and isinstance(optimizer, module.Optimizer8bit)


def is_paged(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's states move to main memory where the GPU is full."""
    return is_of_bitsandbytes(optimizer) and bool(getattr(optimizer, PAGED, False))


@contextlib.contextmanager
def without_waits(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While a step is taken, let the CPU run ahead.

    bitsandbytes waits for the GPU after each weight, hundreds of times in a step. Its kernels are
    in the order of the computation, and the CPU looks at their results in ``state_dict`` alone.
    """
    module: Any = sys.modules.get(MODULE)
    if not is_of_bitsandbytes(optimizer) or not hasattr(module, "sync_gpu"):
        yield
        return
    wait = module.sync_gpu
    module.sync_gpu = lambda tensor: None
    try:
        yield
    finally:
        module.sync_gpu = wait


def state_dict(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer's ``state_dict`` gave, with paged tensors as plain ones of main memory."""
    if not is_paged(optimizer):
        return state
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {**state, "state": _unmarked(state["state"])}


def _unmarked(value: Any) -> Any:
    """A nested state whose tensors have no mark of paged memory."""
    if isinstance(value, dict):
        return {key: _unmarked(item) for key, item in value.items()}
    return value.detach() if isinstance(value, Tensor) else value


@contextlib.contextmanager
def loading(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While a state is loaded, leave it in main memory; then page what the optimizer pages.

    bitsandbytes would load all of it onto the GPU, where it stays.
    """
    if not is_paged(optimizer):
        yield
        return
    paged: Any = optimizer
    load = paged.load_state_dict
    paged.load_state_dict = lambda state: load(state, move_to_device=False)
    try:
        yield
    finally:
        del paged.load_state_dict
    for weight, values in optimizer.state.items():
        for name, value in values.items():
            if not isinstance(value, Tensor):
                continue
            if name in STATES:
                values[name] = paged.get_state_buffer(weight, dtype=value.dtype)
                values[name].copy_(value)
            else:
                values[name] = value.to(weight.device)
