"""Attention on any device: torch's scaled-dot-product attention, and blocks of queries.

Shapes: B batch, H query heads, K key heads (H is a multiple of K), S queries, T keys (the queries
are those of the last S keys), D width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from xtuner.model.backends.case import Case
from xtuner.model.backends.interfaces import AttentionOptions, DenseKernel
from xtuner.model.backends.registry import Backend
from xtuner.utils.lang import tr

BLOCK = 1024
"""Queries of a block: no more than ``BLOCK`` x T scores are formed at once."""


def attend(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """A ``DenseKernel``: scaled-dot-product attention without a mask."""
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=options.dropout,
        is_causal=options.causal and query.shape[2] > 1,
        scale=options.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous()


def attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
) -> Tensor:
    """A ``DenseKernel``: block by block of the queries, with the keys that each block can see."""
    new, total = query.shape[2], key.shape[2]
    left, right = options.window
    parts = []
    for start in range(0, new, BLOCK):
        stop = min(start + BLOCK, new)
        positions = torch.arange(start, stop, device=query.device) + (total - new)
        first = 0 if left < 0 else max(0, total - new + start - left)
        last = total if right < 0 else min(total, total - new + stop + right)
        mask = _visible(positions, torch.arange(first, last, device=query.device), left, right)
        seen, values = (tensor[:, :, first:last] for tensor in (key, value))
        parts.append(attend_masked(query[:, :, start:stop], seen, values, mask, options))
    return torch.cat(parts, dim=1)


def _visible(queries: Tensor, keys: Tensor, left: int, right: int) -> Tensor:
    """(queries, keys), True where a query sees a key, by their positions."""
    distance = keys[None, :] - queries[:, None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen


def attend_masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: AttentionOptions
) -> Tensor:
    """Attention by a mask, which takes the place of causality and window.

    Args:
        query: (B, H, S, D).
        key: (B, K, T, D).
        value: (B, K, T, V).
        mask: (S, T) or (B, 1, S, T), True where a query sees a key.
        options: scaling, dropout, soft cap and sinks.

    Returns:
        (B, S, H, V).
    """
    return _masked(query, key, value, mask, options).transpose(1, 2).contiguous()


def _masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: AttentionOptions
) -> Tensor:
    """The same as (B, H, S, V)."""
    if options.softcap is None and options.sinks is None:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=options.dropout,
            scale=options.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    scores = (query @ key.transpose(2, 3)).float() * scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return nn.functional.dropout(weights.to(value.dtype), options.dropout) @ value


def _unsupported(case: Case) -> str | None:
    if case.softcap:
        return tr("it has no soft cap")
    if case.sinks:
        return tr("it has no attention sinks")
    if case.sliding_window:
        return tr("it has no sliding window")
    if case.causal and case.cached and not case.single_query:
        return tr("it has no causal mask for several tokens after cached ones")
    return None


SDPA: Backend[DenseKernel] = Backend("torch sdpa", _unsupported, lambda case: attend)
BLOCKS: Backend[DenseKernel] = Backend(
    "blocks of queries", lambda case: None, lambda case: attend_in_blocks
)
