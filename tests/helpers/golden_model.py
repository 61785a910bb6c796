"""Tiny models with weights by a formula, and figures of theirs that can be compared across code.

The figures in ``tests/golden/families`` were made with the hub's own modeling code and these very
functions; its code is not in this repository.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LOGITS = 12
"""How many logits, spread over all of them, are kept as figures."""


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give each weight numbers that depend on its place in the order of names alone."""
    for place, (name, weight) in enumerate(sorted(model.named_parameters())):
        weight.copy_(_wave(weight.numel(), place).view(weight.shape) * 0.12)
        if ("norm" in name or ".ln_" in name) and name.endswith("weight"):
            weight.add_(1.0)


def tokens(rows: int, length: int, vocabulary: int) -> Tensor:
    """(rows, length) ids from 3 on, so that no special token is among them."""
    places = torch.arange(rows * length)
    return (3 + (places * 7919 + places**2) % (vocabulary - 3)).view(rows, length)


def figures(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Any]:
    """The mean cross-entropy of the next tokens, some logits, and the gradient of each weight.

    Args:
        model: gives an output with ``logits`` (B, S, V).
        inputs: what it is called with.
        labels: (B, S), -100 where nothing is to be learnt; the token at a place itself.

    Returns:
        ``loss``, ``logits`` and, for each weight, the norm of its gradient and its product with a
        fixed vector.
    """
    model.zero_grad()
    logits = model(**inputs).logits.float()
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    kept = logits.detach()[labels != -100].flatten()
    gradients = {
        name: [float(weight.grad.norm()), float((weight.grad.flatten() * _signs(weight)).sum())]
        for name, weight in sorted(model.named_parameters())
        if weight.grad is not None
    }
    step = max(1, len(kept) // LOGITS)
    return {"loss": float(loss.detach()), "logits": kept[::step].tolist(), "gradients": gradients}


def _wave(length: int, place: int) -> Tensor:
    number = torch.arange(length, dtype=torch.float64)
    wave = torch.sin(number * 0.7310585 + place * 1.618) * (1 + 0.5 * torch.cos(number * 0.0137))
    return wave.float()


def _signs(weight: Tensor) -> Tensor:
    return torch.cos(torch.arange(weight.numel(), dtype=torch.float64) * 0.377).to(weight)
