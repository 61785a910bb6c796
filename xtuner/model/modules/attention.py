"""Attention for packed and padded rows on every backend, registered once with transformers.

``use_for(llm)`` makes a model compute its attention with the function ``xtuner``. Borders of packed
samples reach it as ``cu_seq_lens_q``, an argument that models hand on to their attention. No mask
is formed where the samples' borders say it all.

Backends: flash-attn on a GPU where it is installed, else torch's own variable-length attention; on a
CPU, and for what a kernel lacks (soft caps, sinks, dropout), tiles in plain torch.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from xtuner.model.modules.tiles import Scoring, tiled_attention
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

NAME = "xtuner"
HALVES = (torch.float16, torch.bfloat16)
FLASH_HEAD_DIM = 256

_IN_PACKED_ROW = contextvars.ContextVar("in_packed_row", default=False)


@contextlib.contextmanager
def packed_rows() -> Iterator[None]:
    """While a model is given packed rows with their borders, so that it needs no mask."""
    token = _IN_PACKED_ROW.set(True)
    try:
        yield
    finally:
        _IN_PACKED_ROW.reset(token)


def use_for(llm: Any) -> bool:
    """Make a model compute its attention here, where its architecture allows it.

    Args:
        llm: a model of transformers.

    Returns:
        Whether it does. Code of a model's own that does not go through transformers' attention
        interface stays as it is.
    """
    if not (getattr(llm, "_supports_attention_backend", False) and llm._supports_sdpa):
        return False
    if not llm._can_set_attn_implementation():
        return False
    llm.set_attn_implementation(NAME)
    return True


def require_borders(llm: Any) -> None:
    """See that samples of a packed row are kept apart by this model, whichever attention it uses.

    Raises:
        UserError: when they would not be.
    """
    if getattr(llm, "_supports_attention_backend", False) or getattr(llm, "_supports_sdpa", False):
        return  # transformers' own code, which reads the borders or the restarting positions
    raise UserError(
        tr(
            f"{type(llm).__name__} does not go through transformers' attention interface, so it "
            "cannot keep the samples of a packed row apart.",
            f"{type(llm).__name__} 没有使用 transformers 的注意力接口，无法隔开打包在同一行的样本。",
        ),
        hint=tr(
            "set use_varlen_attn = False, or use the model's native class (without "
            "trust_remote_code) where transformers has one.",
            "请设置 use_varlen_attn = False，或使用 transformers 自带的模型类（不加 trust_remote_code）。",
        ),
    )


def mask_if_needed(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    local_size: int | None = None,
    config: Any = None,
    **others: Any,
) -> Tensor | None:
    """What transformers calls to form a mask: the padding ``(B, S)`` or nothing, where that is all.

    In all other cases (a cache, a pattern of the model's own) it is the mask that SDPA would get.
    """
    chunked = local_size is not None and local_size == getattr(config, "attention_chunk_size", None)
    whole = q_length == kv_length and kv_offset == 0
    whole = whole and isinstance(q_offset, int) and q_offset == 0
    causal = allow_is_causal_skip or _IN_PACKED_ROW.get()
    if whole and causal and not use_vmap and not (chunked and kv_length > (local_size or 0)):
        if attention_mask is None or bool(attention_mask.all()):
            return None
        return attention_mask
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        local_size=local_size,
        config=config,
        **others,
    )


@torch.compiler.disable
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' models call it.

    Args:
        module: the attention layer.
        query: ``(B, Hq, S, D)``.
        key: ``(B, Hkv, S, D)``.
        value: ``(B, Hkv, S, Dv)``.
        attention_mask: ``(B, S)``, a mask of four dimensions, or None: see ``mask_if_needed``.
        dropout: share of the attention weights that is dropped.
        scaling: factor on the scores; ``D ** -0.5`` when None.
        sliding_window: how many tokens back a token sees, itself counted.
        softcap: bound that scores are bent towards.
        is_causal: whether tokens see only what is before them; the layer's own when None.
        s_aux: ``(Hq,)``, sinks.
        cu_seq_lens_q: borders of packed samples, ``(num_samples + 1,)``; B = 1.
        max_length_q: length of the longest of them.
        others: what is of no use here.

    Returns:
        ``(B, S, Hq, Dv)``, zeros at padding; and None.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scoring = Scoring(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=sliding_window,
        softcap=softcap,
        dropout=dropout,
        seed=int(torch.randint(2**31, ())) if dropout else 0,
    )
    masked = attention_mask is not None and attention_mask.dim() != 2
    if not causal or masked or query.shape[2] != key.shape[2] or "position_bias" in others:
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
            )
        return _whole_attention(query, key, value, attention_mask, scoring, s_aux), None
    query, key = query.to(value.dtype), key.to(value.dtype)
    if cu_seq_lens_q is not None:
        return _packed(query, key, value, cu_seq_lens_q, max_length_q, scoring, s_aux), None
    if attention_mask is None:
        return _unpadded(query, key, value, scoring, s_aux), None
    return _padded(query, key, value, attention_mask, scoring, s_aux), None


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    longest: int | None,
    scoring: Scoring,
    sinks: Tensor | None,
) -> Tensor:
    """Attention over one packed row: ``(1, H, T, D)`` to ``(1, T, Hq, Dv)``."""
    kernel = _kernel_for(query, value, scoring, sinks)
    if kernel is None:
        rows = tiled_attention(query[0], key[0], value[0], borders.tolist(), scoring, sinks)
        return rows.transpose(0, 1).unsqueeze(0)
    if longest is None:
        longest = int((borders[1:] - borders[:-1]).max())
    width = value.shape[-1]
    value = F.pad(value, (0, query.shape[-1] - width))  # kernels want one width for all
    across = [states[0].transpose(0, 1).contiguous() for states in (query, key, value)]
    rows = kernel(*across, borders.to(torch.int32), longest, scoring)
    return rows[..., :width].unsqueeze(0)


def _unpadded(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, sinks: Tensor | None
) -> Tensor:
    """Attention over whole rows, each a sample: as one packed row."""
    batch, _, length, _ = query.shape
    borders = torch.arange(0, (batch + 1) * length, length, device=query.device)
    flat = [states.transpose(0, 1).flatten(1, 2).unsqueeze(0) for states in (query, key, value)]
    rows = _packed(*flat, borders, length, scoring, sinks)
    return rows.view(batch, length, *rows.shape[2:])


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scoring: Scoring,
    sinks: Tensor | None,
) -> Tensor:
    """Attention over padded rows: the tokens that are there, as one packed row."""
    batch, length = mask.shape
    there = mask.bool()
    lengths = there.sum(1)
    at = there.flatten().nonzero().squeeze(1)
    borders = F.pad(lengths[lengths > 0].cumsum(0), (1, 0))
    flat = [
        states.transpose(0, 1).flatten(1, 2)[:, at].unsqueeze(0) for states in (query, key, value)
    ]
    rows = _packed(*flat, borders, None, scoring, sinks)[0]
    whole = rows.new_zeros(batch * length, *rows.shape[1:]).index_copy(0, at, rows)
    return whole.view(batch, length, *rows.shape[1:])


def _whole_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scoring: Scoring,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with a given mask and what SDPA lacks: for generating, where rows are short."""
    batch, heads, rows, _ = query.shape
    shared = heads // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.transpose(2, 3) * scoring.scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    elif rows > 1:
        later = torch.ones(rows, key.shape[2], dtype=torch.bool, device=query.device)
        scores = scores.masked_fill(later.triu(key.shape[2] - rows + 1), float("-inf"))
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, heads, 1, 1).expand(batch, -1, rows, 1)
        scores = torch.cat([scores, sink], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    weights = F.dropout(weights[..., : key.shape[2]], scoring.dropout)
    return (weights @ value).transpose(1, 2)


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, Scoring], Tensor]


def _kernel_for(
    query: Tensor, value: Tensor, scoring: Scoring, sinks: Tensor | None
) -> Kernel | None:
    """The GPU kernel that can compute this, if there is one."""
    if query.device.type != "cuda" or value.dtype not in HALVES or sinks is not None:
        return None
    if query.shape[-1] > FLASH_HEAD_DIM:
        return None
    if importlib.util.find_spec("flash_attn") is not None:
        return _flash_attn
    torch_has_it = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    if torch_has_it and scoring.softcap is None and not scoring.dropout:
        return _torch_varlen
    return None


def _flash_attn(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, scoring: Scoring
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=borders,
        cu_seqlens_k=borders,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        dropout_p=scoring.dropout,
        softmax_scale=scoring.scale,
        causal=True,
        window_size=_window(scoring),
        softcap=scoring.softcap or 0.0,
    )


def _torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, scoring: Scoring
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    shared = query.shape[1] // key.shape[1]
    if shared > 1:  # versions differ in whether they take grouped heads
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    return varlen_attn(
        query, key, value, borders, borders, longest, longest,
        scale=scoring.scale, window_size=_window(scoring),
    )  # fmt: skip


def _window(scoring: Scoring) -> tuple[int, int]:
    """Tokens to the left and right that a token sees, itself not counted; -1 for all."""
    return (-1 if scoring.window is None else scoring.window - 1, 0)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask_if_needed)
