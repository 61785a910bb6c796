"""Attention and experts of a planned model: they compute nothing.

Their outputs have the right shapes, and they keep for the backward pass what a GPU's kernels keep.
transformers calls them by name, as it calls those that compute.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.utils.types import AutogradContext

NAME = "xtuner_plan"


class _Kept(torch.autograd.Function):
    """Keeps what flash attention keeps: query, key, value, output and a logsumexp of each row."""

    @staticmethod
    def forward(ctx: AutogradContext, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1])
        logsumexp = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: AutogradContext, *gradients: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError("a planned model has no backward pass")


def planned_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **_: object,
) -> tuple[Tensor, None]:
    """Take the place of ``model.modules.attention``.

    Args:
        module: the layer.
        query: (B, H, S, D).
        key: (B, K, S, D).
        value: (B, K, S, V).
        attention_mask: unused, like all other settings.

    Returns:
        (B, S, H, V), and None in place of the weights.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out: Tensor = _Kept.apply(query, key, value)
    return out, None


def planned_experts(
    experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Take the place of transformers' ``grouped_mm_experts_forward``.

    All tokens go to the first expert: which expert computes a token changes no size.

    Args:
        experts: a layer with ``gate_up_proj`` or ``up_proj``, and ``down_proj``.
        hidden: (T, H).
        top_k_index: (T, k).
        top_k_weights: (T, k).

    Returns:
        (T, H).
    """
    tokens, chosen = top_k_index.shape
    rows = hidden.index_select(0, top_k_index.new_zeros(tokens * chosen))
    up, down = experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj
    inner = _product(experts, rows, up)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    out = _product(experts, inner, down) * top_k_weights.reshape(-1, 1)
    return out.view(tokens, chosen, -1).sum(1).to(hidden.dtype)


def use_planned_experts(language_model: Any) -> None:
    """Let a mixture's layers call ``planned_experts``, or its equivalent for a list of experts."""
    for config in (language_model.config, language_model.config.get_text_config()):
        config._experts_implementation = NAME
    for module in language_model.modules():
        experts = getattr(module, "experts", None)
        if hasattr(module, "routed") and isinstance(experts, nn.ModuleList):
            module.routed = functools.partial(_first_of_list, experts)


def _first_of_list(
    experts: nn.ModuleList, hidden: Tensor, top_k_weights: Tensor, top_k_index: Tensor
) -> Tensor:
    """As ``planned_experts``, in place of ``DeepseekMoE.routed``."""
    tokens, chosen = top_k_index.shape
    rows = hidden.index_select(0, top_k_index.new_zeros(tokens * chosen))
    out = experts[0](rows) * top_k_weights.reshape(-1, 1)
    return out.view(tokens, chosen, -1).sum(1).to(hidden.dtype)


def _product(experts: Any, rows: Tensor, weight: Tensor) -> Tensor:
    matrix = weight[0] if experts.is_transposed else weight[0].T
    return rows @ matrix.to(rows.dtype)


def register() -> None:
    """Make the functions known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ExpertsInterface

    AttentionInterface.register(NAME, planned_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    ExpertsInterface.register(NAME, planned_experts)


def _no_mask(*_: object, **settings: object) -> None:
    return None
