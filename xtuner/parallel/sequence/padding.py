"""Padding rows to a multiple of the ranks that share them."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner.parallel.sequence.groups import get_sequence_parallel_world_size


def missing(length: int, size: int) -> int:
    """The padding that makes ``length`` a multiple of ``size``, in tokens."""
    return -length % size


def pad_for_sequence_parallel(tensor: Tensor, padding_value: float, dim: int = -1) -> Tensor:
    """Pad a tensor along ``dim`` to a multiple of the sequence-parallel world size.

    Args:
        tensor: for example (B, S) or (B, S, H).
        padding_value: of the padding.
        dim: the dimension of the tokens.
    """
    count = missing(tensor.shape[dim], get_sequence_parallel_world_size())
    return padded(tensor, count, padding_value, dim)


def padded(tensor: Tensor, count: int, value: float, dim: int) -> Tensor:
    """Append ``value`` ``count`` times along ``dim``."""
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
        cumulative_len: one tensor (samples + 1,), cu_seqlens of the row.

    Returns:
        cu_seqlens with the padding, and a mask (1, padded S), False at the padding; unchanged and
        None where the row needs no padding.
    """
    (cu_seqlens,) = cumulative_len
    length = int(cu_seqlens[-1])
    count = missing(length, get_sequence_parallel_world_size())
    if not count:
        return cumulative_len, None
    mask = torch.arange(length + count, device=cu_seqlens.device)[None] < length
    return [padded(cu_seqlens, 1, length + count, 0)], mask
