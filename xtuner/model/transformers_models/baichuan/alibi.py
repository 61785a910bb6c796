"""ALiBi (Press et al., Train Short, Test Long, 2022) without a bias: as more columns of each head.

ALiBi adds ``slope * (position of the key - position of the query)`` to a score before the softmax,
which does not change with what is the same for all keys of a query: ``slope * position of the key``
does. That is a product of a number of the query's head and a number of the key, so it fits into
the product of queries and keys. Every attention function then computes it, with packed and padded
rows, on each device, without a mask of (S, S).

Products of 16 bits are summed in float32, but their factors are rounded. So each factor is a sum of
numbers that bfloat16 holds exactly: a slope of three (24 bits), a position of two (16 bits).

Shapes: B batch, S tokens, N heads, D width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import eager_attention_forward

COLUMNS = 8
"""How much wider heads become: six products, and two zeros, as kernels want multiples of 8."""
RADIX = 256
"""Integers up to this are exact in bfloat16."""


def slopes(heads: int) -> list[float]:
    """The slope of each head, as in the paper, its footnote on other numbers than powers of 2."""
    power = 2 ** int(math.log2(heads))
    found = [2 ** (-8 * (index + 1) / power) for index in range(power)]
    others = [2 ** (-8 * (index + 1) / (2 * power)) for index in range(0, 2 * power, 2)]
    return found + others[: heads - power]


def query_columns(heads: int, scaling: float, device: torch.device) -> Tensor:
    """(N, 8) in float32, the same for all queries of a head.

    Args:
        heads: N.
        scaling: the factor on the scores, by which these columns are divided.
        device: where to.
    """
    rest = torch.tensor(slopes(heads), dtype=torch.float32, device=device) / scaling
    parts = []
    for _ in range(3):
        part = rest.bfloat16().float()
        parts.append(part)
        rest = rest - part
    low = torch.stack(parts, dim=-1)
    return torch.cat((low, low * RADIX, torch.zeros_like(low[:, :2])), dim=-1)


def key_columns(position_ids: Tensor) -> Tensor:
    """(B, 1, S, 8) in float32, the same for all heads.

    Args:
        position_ids: (B, S), less than 65,536.
    """
    low, high = position_ids % RADIX, position_ids // RADIX
    zero = torch.zeros_like(low)
    return torch.stack((low,) * 3 + (high,) * 3 + (zero,) * 2, dim=-1)[:, None].float()


def with_alibi(
    query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys whose scores have ALiBi in them.

    Args:
        query: (B, N, S, D).
        key: (B, N, T, D).
        value: (B, N, T, D).
        position_ids: (B, T), or (1, T), of the keys.
        scaling: the factor on the scores.

    Returns:
        The three, each D + 8 wide; the new columns of values, and so of the output, are 0.
    """
    heads = query.shape[1]
    of_query = query_columns(heads, scaling, query.device)[None, :, None].to(query.dtype)
    of_key = key_columns(position_ids).to(key.dtype)
    return (
        torch.cat((query, of_query.expand(*query.shape[:-1], COLUMNS)), dim=-1),
        torch.cat((key, of_key.expand(*key.shape[:-1], COLUMNS)), dim=-1),
        torch.nn.functional.pad(value, (0, COLUMNS)),
    )


def eager_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """transformers' eager attention in float32, as it rounds scores to the format of queries."""
    dtype = query.dtype
    query, key, value = query.float(), key.float(), value.float()
    output, weights = eager_attention_forward(module, query, key, value, *args, **kwargs)
    return output.to(dtype), weights.to(dtype)
