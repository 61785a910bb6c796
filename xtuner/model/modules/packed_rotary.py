"""Rotary embeddings that depend on the length: of each sample, not of the longest one of a batch.

transformers chooses the frequencies of ``longrope`` and ``dynamic`` scaling by the largest position
of a batch, and ``dynamic`` remembers it: a short sample beside a long one is not what it is alone.

Shapes: B batch, S tokens, D width of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Rotary = tuple[Tensor, ...]


def depends_on_length(module: nn.Module) -> bool:
    """Whether a rotary embedding chooses its frequencies by the largest position."""
    kinds = getattr(module, "rope_type", None)
    if not isinstance(kinds, (str, dict)):
        return False
    named = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(kind == "longrope" or "dynamic" in str(kind) for kind in named)


def split_rotary(model: nn.Module) -> None:
    """Make such embeddings of transformers' own compute each sample as if it were alone.

    Args:
        model: a transformers model; a second call changes nothing.
    """
    from xtuner.model.transformers_models.rotary import RotaryEmbedding

    for module in model.modules():
        is_ours = not type(module).__module__.startswith("transformers.")
        rotary: Any = module
        if is_ours or not depends_on_length(module) or isinstance(rotary.forward, _PerSample):
            continue
        if rotary.rope_type == "dynamic":  # without its memory
            rotary.forward = RotaryEmbedding(rotary.config).forward
        else:
            rotary.forward = _PerSample(rotary.forward)


class _PerSample:
    """The ``forward`` of a rotary embedding, called for each sample of a row, and for each row."""

    def __init__(self, forward: Callable[..., Rotary]) -> None:
        self.forward = forward

    def __call__(self, x: Tensor, position_ids: Tensor, *args: object, **kwargs: object) -> Rotary:
        """Cosines and sines (B, S, D) for (B, S) positions; ``x`` gives device and format."""
        if len(position_ids) > 1:
            return _joined([self(x, row[None], *args, **kwargs) for row in position_ids], 0)
        starts = torch.eq(position_ids[0], 0).nonzero().flatten().tolist()
        boundaries = [0, *starts[1:], position_ids.shape[1]]
        lengths = [stop - start for start, stop in itertools.pairwise(boundaries)]
        parts = position_ids.split(lengths, dim=1)
        return _joined([self.forward(x, part, *args, **kwargs) for part in parts], 1)


def _joined(parts: list[Rotary], dim: int) -> Rotary:
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(tensors, dim=dim) for tensors in zip(*parts, strict=True))
