"""The loss of a large vocabulary: ours, liger-kernel's and torch's, in one process on one GPU.

It decides which of the first two a GPU computes with (``backends/cross_entropy.py``).

Shapes: N tokens, H hidden, V words.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gpu_checks import tiny
from gpu_checks.items import Facts, Item, Setting

GIB = 2**30
SHAPES = {
    "qwen2_5_7b, frozen head": (8192, 3584, 152064, False),
    "qwen2_5_7b, trained head": (8192, 3584, 152064, True),
    "llama2_7b, frozen head": (8192, 4096, 32000, False),
    "qwen2_5_7b, frozen head, 32k tokens": (32768, 3584, 152064, False),
}
"""N, H, V, whether the head is trained: then its weight is float32."""
TINY = (48, 64, 512)
WARM, TIMED = 2, 5
GAP = 2e-2
"""Largest relative difference of our loss and gradients from torch's, in bfloat16."""
Loss: TypeAlias = Callable[[Tensor, nn.Linear, Tensor], Tensor]
"""The sum over (N, H), a head and (N,) targets."""


def ours(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """That of ``xtuner train``."""
    from xtuner.model.modules.loss import linear_cross_entropy

    return linear_cross_entropy(hidden, head, targets)


def liger(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """liger-kernel's fused linear cross-entropy."""
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    loss: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(head.weight, hidden, targets)
    return loss


def plain(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """torch's, of all logits."""
    return nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")


SIDES: dict[str, Loss] = {"ours": ours, "liger": liger, "torch": plain}


def speed(setting: Setting, sides: dict[str, Loss] = SIDES) -> Facts:
    """Milliseconds of forward and backward, peak memory beside the inputs, and differences."""
    found: dict[str, Any] = {}
    wrong = []
    for name, (*sizes, trained) in SHAPES.items():
        tokens, width, words = TINY if setting.dry else sizes
        torch.manual_seed(0)
        dtype = torch.float32 if trained else torch.bfloat16
        head = nn.Linear(width, words, bias=False, device=setting.device, dtype=dtype)
        head.requires_grad_(trained)
        hidden = torch.randn(tokens, width, device=setting.device, dtype=torch.bfloat16)
        hidden.requires_grad_()
        targets = torch.randint(words, (tokens,), device=setting.device)
        rows, wanted = {}, None
        for side, loss in sides.items():
            try:
                inputs = (hidden, head, targets)
                rows[side], outcome = _measured(loss, inputs, setting.device)
            except Exception as error:  # of a library that is absent or broken, or out of memory
                rows[side] = {"why": f"{type(error).__name__}: {error}"[:160]}
                continue
            if wanted is None:
                wanted = outcome
                continue
            gaps = [tiny.gap(*pair) for pair in zip(outcome, wanted, strict=True)]
            rows[side]["largest gap"] = f"{max(gaps):.1e}"
            if side == "torch" and not max(gaps) <= GAP:
                wrong.append(f"{name}: {side}")
        found[name] = rows
        del head, hidden, targets, wanted
    return {"sides": found, "wrong": wrong}


def _measured(
    loss: Loss, inputs: tuple[Tensor, nn.Linear, Tensor], device: str
) -> tuple[Facts, list[Tensor]]:
    """The figures of a loss; it and the gradients of its inputs, on the CPU."""
    hidden, head, _ = inputs
    trained = [each for each in (hidden, head.weight) if each.requires_grad]
    on_gpu, times, before = device == "cuda", [], 0
    gc.collect()
    for number in range(WARM + TIMED):
        for each in trained:
            each.grad = None
        if on_gpu:
            torch.cuda.synchronize()
        if on_gpu and number == WARM:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        begun = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            value = loss(*inputs)
        value.backward()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    facts: Facts = {"ms": round(min(times[WARM:]) * 1e3, 2)}
    if on_gpu:
        facts["peak GiB"] = round((torch.cuda.max_memory_allocated() - before) / GIB, 2)
    gradients = [each.grad.float().cpu() for each in trained if each.grad is not None]
    return facts, [value.detach().float().cpu()[None], *gradients]


def items() -> list[Item]:
    """The check of this file."""
    return [Item("loss/speed", 2, speed, 90, alone=True)]
