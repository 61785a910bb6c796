"""Causal attention over a short sample on a CPU: torch's kernels, the backward in float32.

The bf16 kernel of the backward pass is slow on short samples: on 128 tokens and fewer it takes
three times as long as the float32 one (on 250 tokens 1.3 times; from 512 on it is the faster one).
So the forward is torch's in bf16, and its backward is torch's in float32, which is no less exact.

Shapes: B batch, H query heads, K key heads (H = K * G), S tokens, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LONGEST = 384
"""Tokens of the longest sample that is computed in this way; measured with heads of 64."""


def applies(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether this way is meant for a sample: short, of one width, in bf16 on a CPU."""
    widths = {query.shape[-1], key.shape[-1], value.shape[-1]}
    types = {query.dtype, key.dtype, value.dtype}
    if query.device.type != "cpu" or types != {torch.bfloat16} or len(widths) > 1:
        return False
    return query.shape[2] == key.shape[2] <= LONGEST


def short_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Attend causally within one sample.

    Args:
        query: (B, H, S, D) in bfloat16.
        key: (B, K, S, D), likewise.
        value: (B, K, S, D), likewise.
        scaling: factor on the scores; 1 / sqrt(D) when None.

    Returns:
        (B, H, S, D) in bfloat16.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    return _Short.apply(query, key, value, scale)


class _Short(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out, norms = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True, scale=scale
        )
        ctx.save_for_backward(query, key, value, out, norms)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        *tensors, norms = ctx.saved_tensors
        wide = [t.to(torch.float32, memory_format=torch.contiguous_format) for t in tensors]
        grad = grads[0].to(torch.float32, memory_format=torch.contiguous_format)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *wide, norms, 0.0, True, scale=ctx.scale
        )
        return *(part.to(torch.bfloat16) for part in found), None
