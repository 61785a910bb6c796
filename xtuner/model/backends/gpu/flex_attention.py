"""Packed rows by torch's flex attention, on a GPU: soft caps, sinks and head widths of all kinds.

It is compiled, at the first call, for each soft cap and kind of mask. The block mask of a row says
which blocks of scores are computed at all; it is made once for all layers.

Shapes: T tokens of the row, H query heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xtuner.model.backends import environment
from xtuner.model.backends.case import AMPERE, Case
from xtuner.model.backends.interfaces import (
    AttentionOptions,
    OncePerTensor,
    PackedKernel,
    Packing,
)
from xtuner.model.backends.registry import Backend
from xtuner.utils.lang import tr


def flex_attention_kernel(case: Case) -> PackedKernel:
    """Flex attention with a mask of the samples; compiled on a GPU, plain torch elsewhere."""
    compiled = case.device == "cuda"
    function = _function(compiled)
    keywords = case.libraries.flex_attention.keywords

    def attend(
        query: Tensor, key: Tensor, value: Tensor, packing: Packing, options: AttentionOptions
    ) -> Tensor:
        mask = _block_mask(packing.cu_seqlens, query.shape[2], options.window, compiled)
        settings = dict(block_mask=mask, scale=options.scaling)
        settings["enable_gqa"] = query.shape[1] != key.shape[1]
        if options.softcap is not None:
            settings["score_mod"] = _capped(options.softcap)
        if options.sinks is None:
            out: Tensor = function(query, key, value, **settings)
        else:
            out, lse = _with_lse(function, keywords, query, key, value, settings)
            # a column of the softmax without a value takes this share of the weight
            kept = torch.sigmoid(lse - options.sinks.float()[:, None])
            out = (out * kept[..., None]).to(value.dtype)
        return out.transpose(1, 2).contiguous()

    return attend


@functools.cache
def _function(compiled: bool) -> Callable[..., Any]:
    function = environment.function("flex_attention")
    return torch.compile(function, dynamic=True) if compiled else function


def _with_lse(
    function: Callable[..., Any],
    keywords: frozenset[str],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of the scores of each query, (1, H, T)."""
    if "return_aux" in keywords:
        from torch.nn.attention.flex_attention import AuxRequest

        out, aux = function(query, key, value, return_aux=AuxRequest(lse=True), **settings)
        return out, aux.lse
    out, lse = function(query, key, value, return_lse=True, **settings)
    return out, lse


@functools.cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    """One function for each soft cap: another function would be compiled anew."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@OncePerTensor
def _block_mask(cu_seqlens: Tensor, tokens: int, window: tuple[int, int], compiled: bool) -> object:
    """Which scores of a row of T tokens are computed, as flex attention takes it."""
    from torch.nn.attention.flex_attention import create_block_mask

    places = torch.arange(tokens, device=cu_seqlens.device)
    sample = torch.bucketize(places, cu_seqlens[1:].long(), right=True)
    left, right = window

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = sample[q] == sample[k]
        if left >= 0:
            seen = seen & (q - k <= left)
        if right >= 0:
            seen = seen & (k - q <= right)
        return seen

    device = cu_seqlens.device
    return create_block_mask(mask_mod, None, None, tokens, tokens, device, _compile=compiled)


def _unsupported(case: Case) -> str | None:
    library = case.libraries.flex_attention
    if library.error:
        return library.error
    if case.capability is None or case.capability < AMPERE:
        return tr("it needs compute capability 8.0 or higher")
    if case.cached:
        return tr("it has no cached keys")
    if case.dropout:
        return tr("it has no dropout")
    return None


FLEX_ATTENTION: Backend[PackedKernel] = Backend(
    "flex attention", _unsupported, flex_attention_kernel, device="cuda"
)
