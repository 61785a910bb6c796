"""Attention for packed and padded rows that never forms a mask of S x S.

One function is registered with transformers' ``AttentionInterface`` under the name ``xtuner``, so
it serves every architecture that asks that interface. Where a batch is packed, the borders of its
samples come with the call (``cu_seq_lens_q``) and each sample attends to itself alone:

* flash-attn where it is installed and the tensors are on a GPU,
* torch's own variable-length kernel on a GPU without it,
* scaled-dot-product attention sample by sample elsewhere; on a CPU see ``cpu_attention``.

Where ranks share rows (``sequence_group``), they exchange tokens for heads before and after, so
that all of this looks at whole rows.

Shapes: B batch, H query heads, K key heads (H is a multiple of K), S tokens, D width of a head.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from xtuner.model.backends.cpu import attention as cpu_attention
from xtuner.parallel.sequence.heads import no_heads, to_heads, to_tokens

NAME = "xtuner"
BLOCK = 1024
"""Queries taken at once where a window or a soft cap needs scores of its own."""


def register() -> str:
    """Make the function known to transformers; return the name to ask for."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(NAME, attention)
    # Flash attention's masks: none where attention is causal, else the (B, S) mask as it came.
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    return NAME


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    s_aux: Tensor | None = None,
    sequence_group: Any = None,
    sequence_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend causally; packed samples and padding do not see each other.

    Args:
        module: the layer; ``is_causal`` False on it lets tokens see what follows them.
        query: (B, H, S, D).
        key: (B, K, T, D); T > S when cached keys stand before the new ones.
        value: (B, K, T, D).
        attention_mask: (B, T), 0 where there is padding; None when there is none.
        scaling: factor on the scores; 1 / sqrt(D) when None.
        dropout: probability with which a score is dropped.
        sliding_window: how many tokens, itself included, a token sees; None: all before it.
        softcap: scores are ``softcap * tanh(scores / softcap)``; None: as they are.
        cu_seq_lens_q: (samples + 1,) borders of the samples of a packed row; B is 1.
        max_length_q: tokens of the longest packed sample.
        sequence_group: the ranks that share the rows. S is then this rank's stretch; borders and
            ``sequence_mask`` are those of whole rows.
        sequence_mask: takes the place of ``attention_mask`` with a ``sequence_group``.

    Returns:
        (B, S, H, D), and None in place of the weights.

    Raises:
        NotImplementedError: for attention sinks.
    """
    if s_aux is not None:
        raise NotImplementedError(
            "attention sinks are not computed here: set attn_implementation='eager' in the model "
            "and use_varlen_attn=False."
        )
    query, key, value = _as_autocast((query, key, value))
    causal = bool(getattr(module, "is_causal", True))
    settings: dict[str, Any] = {
        "scaling": scaling,
        "dropout": dropout,
        "window": sliding_window,
        "cap": softcap,
    }
    packed = None if cu_seq_lens_q is None else (cu_seq_lens_q, max_length_q)
    if sequence_group is None:
        return _attend(query, key, value, attention_mask, causal, packed, settings), None
    heads = query.shape[1]
    query, key, value = to_heads(query, key, value, sequence_group)
    if query.shape[1]:
        out = _attend(query, key, value, sequence_mask, causal, packed, settings)
    else:
        out = no_heads(query, key, value)
    return to_tokens(out, heads, sequence_group), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    causal: bool,
    borders: tuple[Tensor, int | None] | None,
    settings: dict[str, Any],
) -> Tensor:
    """Attention over whole rows: (B, S, H, D)."""
    if borders is not None:
        cu_seq_lens_q, max_length_q = borders
        if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
            packed = _packed_on_gpu(
                query, key, value, cu_seq_lens_q, int(max_length_q or query.shape[2]), **settings
            )
            if packed is not None:
                return packed
        lengths = cu_seq_lens_q.diff().tolist()
        if (
            causal
            and _is_plain(max(lengths), settings)
            and cpu_attention.applies(query, key, value)
        ):
            return cpu_attention.attend(query, key, value, lengths, settings["scaling"])
    elif attention_mask is not None and not bool(attention_mask.all()):
        return _padded(query, key, value, attention_mask, causal, settings)
    else:
        return _segment(query, key, value, causal, **settings).transpose(1, 2)
    # split, not slices: autograd would make a tensor of zeros of the whole row for each slice
    samples = zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
    parts = [_segment(q, k, v, causal, **settings) for q, k, v in samples if q.shape[2]]
    return torch.cat(parts, dim=2).transpose(1, 2)


def _as_autocast(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What autocast would make of the tensors of each sample, once for all samples."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    causal: bool,
    settings: dict[str, Any],
) -> Tensor:
    """Rows with padding, one by one; the output at padding is 0."""
    new = query.shape[2]
    out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    for row, mask in enumerate(attention_mask.bool()):
        keys = mask.nonzero().flatten()
        # queries are the last `new` of the keys' places
        queries = mask[-new:].nonzero().flatten()
        if not len(queries):
            continue
        part = _segment(
            query[row : row + 1][:, :, queries],
            key[row : row + 1][:, :, keys],
            value[row : row + 1][:, :, keys],
            causal,
            **settings,
        )
        out[row, queries] = part[0].transpose(0, 1).to(out.dtype)
    return out


def _segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    scaling: float | None,
    dropout: float,
    window: int | None,
    cap: float | None,
) -> Tensor:
    """Attention within one sample: (B, H, S, D); queries are the last S of the T keys."""
    new, total = query.shape[2], key.shape[2]
    windowed = causal and window is not None and window < total
    settings = {"dropout": dropout, "window": window, "cap": cap}
    if causal and _is_plain(total, settings) and cpu_attention.applies(query, key, value):
        q, k, v = (t.transpose(0, 1).flatten(1, 2)[None] for t in (query, key, value))
        out = cpu_attention.attend(q, k, v, [total] * len(query), scaling)
        return out[0].unflatten(0, (len(query), total)).transpose(1, 2)
    if not windowed and cap is None and (new == total or new == 1 or not causal):
        return scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=dropout,
            is_causal=causal and new > 1,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    parts = []
    for start in range(0, new, BLOCK):
        stop = min(start + BLOCK, new)
        last = total - new + stop if causal else total
        first = max(0, total - new + start - window + 1) if windowed and window else 0
        mask = _block_mask(total - new + start, total - new + stop, first, last, causal, window)
        parts.append(
            _block(
                query[:, :, start:stop],
                key[:, :, first:last],
                value[:, :, first:last],
                mask.to(query.device),
                scaling,
                dropout,
                cap,
            )
        )
    return torch.cat(parts, dim=2)


def _is_plain(longest: int, settings: dict[str, Any]) -> bool:
    """Whether scores of samples up to so long are causal, and nothing else."""
    window = settings["window"]
    seen = window is None or window >= longest
    return seen and settings["cap"] is None and not settings["dropout"]


def _block_mask(
    query_from: int, query_to: int, key_from: int, key_to: int, causal: bool, window: int | None
) -> Tensor:
    """(queries, keys), True where a query sees a key; positions are those within the sample."""
    queries = torch.arange(query_from, query_to)[:, None]
    keys = torch.arange(key_from, key_to)[None, :]
    if not causal:
        return torch.ones(len(queries), keys.shape[1], dtype=torch.bool)
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def _block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    dropout: float,
    cap: float | None,
) -> Tensor:
    if cap is None:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(2, 3)).float() * factor
    scores = cap * torch.tanh(scores / cap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(query.dtype)
    return nn.functional.dropout(weights, dropout) @ value


def _packed_on_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    longest: int,
    scaling: float | None,
    dropout: float,
    window: int | None,
    cap: float | None,
) -> Tensor | None:
    """The packed row by one kernel, (1, S, H, D); None where no kernel here can do it."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    sides = (-1 if window is None else window - 1, 0)
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q,
            k,
            v,
            borders,
            borders,
            longest,
            longest,
            dropout_p=dropout,
            softmax_scale=scaling,
            causal=True,
            window_size=sides,
            softcap=cap or 0.0,
        ).unsqueeze(0)
    if dropout or cap is not None or importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    out: Any = varlen_attn(
        q,
        k,
        v,
        borders,
        borders,
        longest,
        longest,
        scale=scaling,
        window_size=sides,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.unsqueeze(0)
