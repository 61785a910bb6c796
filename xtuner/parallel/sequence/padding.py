"""Making rows long enough to be cut in equal stretches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtuner.parallel.sequence.groups import get_sequence_parallel_world_size


def missing(length: int, size: int) -> int:
    """How many tokens a row of ``length`` lacks to be a multiple of ``size``."""
    return -length % size


def pad_for_sequence_parallel(tensor: Tensor, padding_value: Any, dim: int = -1) -> Tensor:
    """Pad a tensor along ``dim`` to a multiple of the ranks that share a row.

    Args:
        tensor: for example (B, S) or (B, S, H).
        padding_value: what stands in the padding.
        dim: the dimension of the tokens.
    """
    count = missing(tensor.shape[dim], get_sequence_parallel_world_size())
    return padded(tensor, count, padding_value, dim)


def padded(tensor: Tensor, count: int, value: Any, dim: int) -> Tensor:
    """Append ``count`` times ``value`` along ``dim``."""
    if not count:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = count
    return torch.cat([tensor, tensor.new_full(shape, value)], dim=dim)


def pad_cumulative_len_for_sequence_parallel(
    cumulative_len: list[Tensor],
) -> tuple[list[Tensor], Tensor | None]:
    """Add padding to a packed row as a sample of its own.

    Args:
        cumulative_len: one tensor (samples + 1,) with the borders of the row's samples.

    Returns:
        The borders with the padding, and a mask (1, S padded), False at the padding; as they are,
        and None, where the row needs no padding.
    """
    (borders,) = cumulative_len
    length = int(borders[-1])
    count = missing(length, get_sequence_parallel_world_size())
    if not count:
        return cumulative_len, None
    mask = torch.arange(length + count, device=borders.device)[None] < length
    return [padded(borders, 1, length + count, 0)], mask
