"""The exchange around attention: some tokens of all heads for all tokens of some heads, and back.

Rank r of N gets the query heads from r H // N up to (r + 1) H // N and the key heads that these
look at. So H need not be divisible by N, a key head can go to several ranks, and where H < N some
ranks get no head at all.

Shapes: B rows, H query heads, K key heads (H is a multiple of K), N ranks, S tokens of a row (a
multiple of N), D width of a head. A rank holds S/N tokens; h and k are its heads.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from xtuner.parallel.sequence.collectives import exchange


class HeadShare(NamedTuple):
    """The heads of a rank."""

    queries: range
    keys: range
    """Those that the queries look at."""
    key_of_query: tuple[int, ...]
    """For each of ``queries`` the place of its key head in ``keys``."""

    @property
    def regular(self) -> bool:
        """Whether each key head serves as many query heads, in order, as kernels expect."""
        if not self.keys or len(self.queries) % len(self.keys):
            return not self.keys
        each = len(self.queries) // len(self.keys)
        return all(key == place // each for place, key in enumerate(self.key_of_query))


@functools.lru_cache(maxsize=64)
def share_heads(heads: int, key_heads: int, size: int) -> tuple[HeadShare, ...]:
    """Deal the heads out to ``size`` ranks.

    Args:
        heads: H.
        key_heads: K, a divisor of H.
        size: N.
    """
    each = heads // key_heads
    shares = []
    for rank in range(size):
        queries = range(rank * heads // size, (rank + 1) * heads // size)
        wanted = [head // each for head in queries]
        keys = range(wanted[0], wanted[-1] + 1) if wanted else range(0)
        places = tuple(head - keys.start for head in wanted)
        shares.append(HeadShare(queries, keys, places))
    return tuple(shares)


def to_heads(
    query: Tensor, key: Tensor, value: Tensor, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Take all tokens of this rank's heads.

    One exchange for all three, so that the ranks' backward passes meet in it, whatever a rank
    without heads does between.

    Args:
        query: (B, H, S/N, D).
        key: (B, K, S/N, D).
        value: (B, K, S/N, D'), of a width of its own in some models.
        group: the ranks that share the row.

    Returns:
        (B, h, S, D), (B, k, S, D) and (B, k, S, D'); h is a multiple of k, and both may be 0.
    """
    size = dist.get_world_size(group)
    shares = share_heads(query.shape[1], key.shape[1], size)
    parts, given = [], []
    for share in shares:
        for_rank = [
            tensor[:, heads.start : heads.stop].reshape(-1)
            for tensor, heads in zip((query, key, value), _of_three(share), strict=True)
        ]
        parts += for_rank
        given.append(sum(part.numel() for part in for_rank))
    own = shares[dist.get_rank(group)]
    rows, _, tokens, _ = query.shape
    shapes = [
        (rows, len(heads), tokens, tensor.shape[3])
        for tensor, heads in zip((query, key, value), _of_three(own), strict=True)
    ]
    counts = [math.prod(shape) for shape in shapes]
    taken = exchange(torch.cat(parts), given, [sum(counts)] * size, group)
    segments = taken.view(size, sum(counts)).split(counts, dim=1)
    query_of_all, *keys_and_values = (
        piece.reshape(size, *shape).permute(1, 2, 0, 3, 4).flatten(2, 3).to(tensor.dtype)
        for piece, shape, tensor in zip(segments, shapes, (query, key, value), strict=True)
    )
    if not own.regular:
        places = torch.tensor(own.key_of_query, device=key.device)
        keys_and_values = [tensor.index_select(1, places) for tensor in keys_and_values]
    return query_of_all, keys_and_values[0], keys_and_values[1]


def _of_three(share: HeadShare) -> tuple[range, range, range]:
    return share.queries, share.keys, share.keys


def to_tokens(out: Tensor, heads: int, group: Any) -> Tensor:
    """Give the result of this rank's heads back, take that of all heads for its tokens.

    Args:
        out: (B, S, h, D).
        heads: H.
        group: the ranks that share the row.

    Returns:
        (B, S/N, H, D).
    """
    size = dist.get_world_size(group)
    rows, length, own, width = out.shape
    tokens = length // size
    counts = [len(share.queries) for share in share_heads(heads, heads, size)]
    by_rank = out.reshape(rows, size, tokens, own, width).transpose(0, 1).reshape(-1)
    given = [rows * tokens * own * width] * size
    taken = [rows * tokens * count * width for count in counts]
    segments = exchange(by_rank, given, taken, group).split(taken)
    return torch.cat(
        [
            piece.view(rows, tokens, count, width)
            for piece, count in zip(segments, counts, strict=True)
        ],
        dim=2,
    )


def no_heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What attention gives where this rank has no head: (B, S, 0, D').

    It depends on all three, so that backward comes to the exchange as it does on the other ranks.
    """
    return value.transpose(1, 2) + (query.sum() + key.sum()) * 0
