"""The all-to-all around attention: from some tokens of all heads to all tokens of some heads.

Rank r of N gets the query heads from r H // N up to (r + 1) H // N and the key heads that these
attend to. So H need not be divisible by N, a key head can go to several ranks, and where H < N some
ranks get no head at all.

Shapes: B rows, H query heads, K key heads (H is a multiple of K), N ranks, S tokens of a row (a
multiple of N), D head dimension. A rank holds S/N tokens; h and k are its heads.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from xtuner.parallel.sequence.collectives import all_to_all_single


class HeadShare(NamedTuple):
    """The heads of a rank."""

    queries: range
    keys: range
    """Those that the queries attend to."""
    key_of_query: tuple[int, ...]
    """For each of ``queries`` the index of its key head in ``keys``."""

    @property
    def regular(self) -> bool:
        """Whether each key head serves as many query heads, in order, as kernels expect."""
        if not self.keys or len(self.queries) % len(self.keys):
            return not self.keys
        each = len(self.queries) // len(self.keys)
        return all(key == index // each for index, key in enumerate(self.key_of_query))


@functools.lru_cache(maxsize=64)
def share_heads(heads: int, key_heads: int, size: int) -> tuple[HeadShare, ...]:
    """Distribute the heads over ``size`` ranks.

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
        shares.append(HeadShare(queries, keys, tuple(head - keys.start for head in wanted)))
    return tuple(shares)


def to_heads(
    query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Receive all tokens of this rank's heads.

    One collective for all three: the ranks' backward passes meet in it, also where a rank has no
    head and computes nothing in between.

    Args:
        query: (B, H, S/N, D).
        key: (B, K, S/N, D).
        value: (B, K, S/N, D'); some models have D' other than D.
        group: the sequence-parallel group.

    Returns:
        (B, h, S, D), (B, k, S, D) and (B, k, S, D'); h is a multiple of k, and both may be 0.
    """
    size = dist.get_world_size(group)
    shares = share_heads(query.shape[1], key.shape[1], size)
    parts, send_sizes = [], []
    for share in shares:
        for_rank = [
            tensor[:, heads.start : heads.stop].reshape(-1)
            for tensor, heads in zip((query, key, value), _of_three(share), strict=True)
        ]
        parts += for_rank
        send_sizes.append(sum(part.numel() for part in for_rank))
    own = shares[dist.get_rank(group)]
    rows, _, tokens, _ = query.shape
    shapes = [
        (rows, len(heads), tokens, tensor.shape[3])
        for tensor, heads in zip((query, key, value), _of_three(own), strict=True)
    ]
    counts = [math.prod(shape) for shape in shapes]
    received = all_to_all_single(torch.cat(parts), send_sizes, [sum(counts)] * size, group)
    by_tensor = received.view(size, sum(counts)).split(counts, dim=1)
    queries, *keys_and_values = (
        part.reshape(size, *shape).permute(1, 2, 0, 3, 4).flatten(2, 3).to(tensor.dtype)
        for part, shape, tensor in zip(by_tensor, shapes, (query, key, value), strict=True)
    )
    if not own.regular:
        index = torch.tensor(own.key_of_query, device=key.device)
        keys_and_values = [tensor.index_select(1, index) for tensor in keys_and_values]
    return queries, keys_and_values[0], keys_and_values[1]


def of_own_heads(by_head: Tensor, key_heads: int, group: ProcessGroup) -> Tensor:
    """The values of this rank's query heads, in the order of ``to_heads``.

    Args:
        by_head: (H,), for example attention sinks.
        key_heads: K.
        group: the sequence-parallel group.

    Returns:
        (h,), a view: the gradient of the other heads' values is 0.
    """
    share = share_heads(len(by_head), key_heads, dist.get_world_size(group))[dist.get_rank(group)]
    return by_head[share.queries.start : share.queries.stop]


def _of_three(share: HeadShare) -> tuple[range, range, range]:
    return share.queries, share.keys, share.keys


def to_tokens(out: Tensor, heads: int, group: ProcessGroup) -> Tensor:
    """Send the output of this rank's heads back, receive that of all heads for its tokens.

    Args:
        out: (B, S, h, D).
        heads: H.
        group: the sequence-parallel group.

    Returns:
        (B, S/N, H, D).
    """
    size = dist.get_world_size(group)
    rows, length, own, width = out.shape
    tokens = length // size
    counts = [len(share.queries) for share in share_heads(heads, heads, size)]
    by_rank = out.reshape(rows, size, tokens, own, width).transpose(0, 1).reshape(-1)
    send_sizes = [rows * tokens * own * width] * size
    receive_sizes = [rows * tokens * count * width for count in counts]
    received = all_to_all_single(by_rank, send_sizes, receive_sizes, group).split(receive_sizes)
    return torch.cat(
        [
            part.view(rows, tokens, count, width)
            for part, count in zip(received, counts, strict=True)
        ],
        dim=2,
    )


def no_heads(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
    """The output of attention on a rank without heads: (B, S, 0, D').

    It depends on all of them, so that backward reaches the collective as it does on other ranks,
    and sinks have a gradient on each rank.
    """
    zero = (query.sum() + key.sum()) * 0
    if sinks is not None:
        zero = zero + sinks.sum() * 0
    return value.transpose(1, 2) + zero
