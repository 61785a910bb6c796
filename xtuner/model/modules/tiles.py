"""Attention over packed rows in tiles of queries, in plain torch: for CPUs, and for what kernels lack.

A row of several samples is cut into tiles of queries. The keys a tile may see lie between the start
of its first query's sample (or window) and its own end, so one small product does for all samples
of the tile, and what lies outside is never computed:

    keys ->  |sample 1 |   sample 2       | s3 |
    tile 1    #########                           (queries of sample 1 and of the begin of 2)
    tile 2             ##################
    tile 3             . . . . . . . . . .  ####  (the window may cut off the begin of sample 2)

Scores exist for one tile at a time; the backward forms them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TILE = 256


@dataclass(frozen=True)
class Scoring:
    """How scores are made of queries and keys.

    Args:
        scale: factor on the products.
        window: how many tokens back a query sees, itself counted; None for all.
        softcap: bound that scores are bent towards by ``tanh``, or None.
        dropout: share of the attention weights that is dropped.
        seed: of the dropout's random numbers, so that the backward draws the same.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    seed: int = 0


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: list[int],
    scoring: Scoring,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention within each sample of a packed row.

    Args:
        query: ``(Hq, T, D)``.
        key: ``(Hkv, T, D)``; ``Hq`` is a multiple of ``Hkv``.
        value: ``(Hkv, T, Dv)``.
        borders: of the samples, from 0 to T, increasing.
        scoring: how scores are made.
        sinks: ``(Hq,)``, a learnt score per head that takes weight away from all tokens, or None.

    Returns:
        ``(Hq, T, Dv)``.
    """
    return _Tiles.apply(query, key, value, sinks, borders, scoring)


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        borders: list[int],
        scoring: Scoring,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, sinks)
        ctx.plan = (borders, scoring)
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        with torch.autocast(query.device.type, enabled=False):
            for rows, columns, blocked in _tiles(borders, scoring.window, query.device):
                tile = (query[:, rows], key[:, columns], value[:, columns])
                output[:, rows] = _attend(*tile, sinks, blocked, scoring, rows.start)
        return output

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks = ctx.saved_tensors
        borders, scoring = ctx.plan
        grad = outputs[0]
        grad_query = torch.empty_like(query)
        # A key collects from several tiles: in float32, as it would within one large product.
        grad_key = torch.zeros_like(key, dtype=torch.float32)
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        grad_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            for rows, columns, blocked in _tiles(borders, scoring.window, query.device):
                pieces = [query[:, rows], key[:, columns], value[:, columns]]
                pieces += [] if sinks is None else [sinks]
                with torch.enable_grad():
                    leaves = [piece.detach().requires_grad_() for piece in pieces]
                    sink = leaves[3] if sinks is not None else None
                    tile = _attend(*leaves[:3], sink, blocked, scoring, rows.start)
                found = torch.autograd.grad(tile, leaves, grad[:, rows])
                grad_query[:, rows] = found[0]
                grad_key[:, columns] += found[1]
                grad_value[:, columns] += found[2]
                if grad_sinks is not None:
                    grad_sinks += found[3]
        grads = (grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype))
        last = None if grad_sinks is None or sinks is None else grad_sinks.to(sinks.dtype)
        return (*grads, last, None, None)


def _tiles(
    borders: list[int], window: int | None, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows and columns of each tile, and which of its pairs are blocked, ``(rows, columns)``."""
    total = borders[-1]
    cuts = torch.tensor(borders, device=device)
    positions = torch.arange(total, device=device)
    starts = cuts[torch.searchsorted(cuts, positions, right=True) - 1]
    if window is not None:
        starts = torch.maximum(starts, positions - (window - 1))
    firsts = starts[::TILE].tolist()
    for number, begin in enumerate(range(0, total, TILE)):
        end = min(begin + TILE, total)
        first = firsts[number]  # starts never decrease, so the tile's first query sees farthest
        here, there = positions[begin:end, None], positions[None, first:end]
        blocked = (there > here) | (there < starts[begin:end, None])
        yield slice(begin, end), slice(first, end), blocked


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    blocked: Tensor,
    scoring: Scoring,
    number: int,
) -> Tensor:
    """Attention of one tile, ``(Hq, R, D)`` on ``(Hkv, C, D)``; every query sees at least itself."""
    heads, rows, _ = query.shape
    groups, columns, _ = key.shape
    shared = heads // groups
    # Heads that share their keys stand below each other, so keys are not repeated.
    scores = query.reshape(groups, shared * rows, -1) @ key.transpose(1, 2)
    if scoring.scale != 1.0:
        scores = scores * scoring.scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    scores = scores.view(groups, shared, rows, columns).masked_fill(blocked, float("-inf"))
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(groups, shared, 1, 1).expand(-1, -1, rows, 1)
        weights = torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    if scoring.dropout:
        draw = torch.Generator(query.device).manual_seed(scoring.seed + number)
        kept = torch.empty_like(weights).bernoulli_(1 - scoring.dropout, generator=draw)
        weights = weights * kept / (1 - scoring.dropout)
    output = weights.reshape(groups, shared * rows, columns) @ value
    return output.view(heads, rows, -1)
