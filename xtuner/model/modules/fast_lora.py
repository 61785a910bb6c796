"""LoRA and QLoRA on linear layers without their usual cost.

peft adds ``scaling * B(A(dropout(x)))`` to the frozen layer's output in steps of its own: casts, a
product, a multiplication and a sum (of a copy, over 4-bit layers), each over the whole width. Here
the second product is added into the frozen layer's output as it is made (one ``addmm``), and the
frozen weight has no gradient to be computed.

A weight in 4 bits is made whole once a direction, in the number format of the product; a weight
that autocast casts is cast once a direction. Neither is kept between them. Everything else peft
can do (DoRA, merged or switched-off adapters, several at once, 8-bit layers) is left to peft.

Shapes: N tokens, I and O widths of input and output, R rank.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def speed_up(model: nn.Module) -> int:
    """Let the LoRA layers of a model compute in the quick way.

    Args:
        model: a ``PeftModel``; its layers keep peft's classes, names and weights.

    Returns:
        How many layers do.
    """
    from peft.tuners.lora.layer import Linear

    # which peft has imported where there is such a layer; importing it takes seconds
    linear_4bit = getattr(sys.modules.get("peft.tuners.lora.bnb"), "Linear4bit", None)
    count = 0
    for layer in model.modules():
        plain = type(layer) is Linear and type(layer.get_base_layer()) is nn.Linear
        if plain or type(layer) is linear_4bit:
            layer.forward = _Forward(layer, layer.forward)
            count += 1
    return count


class _Forward:
    """The forward of one layer; peft's own where ours does not apply."""

    def __init__(self, layer: Any, of_peft: Callable[..., Tensor]) -> None:
        self.layer, self.of_peft = layer, of_peft

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self._adapter()
        dtype = None if name is None else self._compute_dtype(x, name)
        if args or kwargs or name is None or dtype is None:
            return self.of_peft(x, *args, **kwargs)
        layer, base = self.layer, self.layer.get_base_layer()
        state = _state_of_4bits(base)
        dropped = layer.lora_dropout[name](x)
        lora_a, lora_b = layer.lora_A[name].weight, layer.lora_B[name].weight
        with torch.autocast(x.device.type, enabled=False):
            bias = None if base.bias is None else base.bias.to(dtype)
            frozen = (base.weight.detach(), state, bias)
            scaling = float(layer.scaling[name])
            out: Tensor
            if dropped is x:
                out = _LowRank.apply(x.to(dtype), *frozen, lora_a, lora_b, scaling)
            else:
                low = linear(dropped.to(dtype), lora_a.to(dtype))
                out = _AddLowRank.apply(x.to(dtype), *frozen, low, lora_b, scaling)
        # bitsandbytes answers in the input's format, other layers in that of the product
        return out if state is None else out.to(x.dtype)

    def _adapter(self) -> str | None:
        """The one adapter that is to be applied plainly; None where there is none."""
        layer = self.layer
        if layer.merged or layer.disable_adapters or len(layer.active_adapters) != 1:
            return None
        (name,) = layer.active_adapters
        if name not in layer.lora_A or name in getattr(layer, "lora_variant", {}):
            return None
        base = layer.get_base_layer()
        plain = not (layer.fan_in_fan_out or layer.lora_bias.get(name, False))
        whole = base.weight.ndim == 2  # ZeRO-3 leaves nothing of it here until the layer is called
        frozen = not any(each.requires_grad for each in base.parameters(recurse=False))
        return str(name) if plain and whole and frozen else None

    def _compute_dtype(self, x: Tensor, name: str) -> torch.dtype | None:
        """What the products are computed in; None where peft computes in another way."""
        base, device = self.layer.get_base_layer(), x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        if type(base) is nn.Linear:
            stored = base.weight.dtype
        else:
            stored = base.compute_dtype or x.dtype  # as bitsandbytes takes it from the first input
            state = _state_of_4bits(base)
            rows = (base.out_features, base.in_features)
            if state is None or tuple(state.shape) != rows:  # lost by FSDP, or repacked
                return None
            if autocast and stored not in (dtype, torch.float32):  # rounded twice
                return None
        adapter = self.layer.lora_A[name].weight.dtype
        return dtype if autocast or stored == adapter == dtype else None


def _state_of_4bits(base: Any) -> Any:
    """The ``QuantState`` of a layer in 4 bits; None for other layers, and what has no backward."""
    state = getattr(base.weight, "quant_state", None)
    return None if getattr(state, "packing_format_for_cpu", False) else state


def _whole(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """(O, I) in the format of a product, of a weight as it is stored."""
    if state is None:
        return weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    wanted = copy.copy(state)
    wanted.dtype = dtype  # by its own it would be that of the weight before it was quantised
    whole: Tensor = dequantize_4bit(weight, wanted)
    return whole


class _AddLowRank(torch.autograd.Function):
    """``x W^T + bias + scaling * low B^T``; W (with ``state``: in 4 bits) and bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        state: Any,
        bias: Tensor | None,
        low: Tensor,
        lora_b: Tensor,
        scaling: float,
    ) -> Tensor:
        """Compute (..., O) from ``x`` (..., I), ``weight`` (O, I), ``low`` (..., R), B (O, R)."""
        out = linear(x, _whole(weight, state, x.dtype), bias)
        flat = out.view(-1, out.shape[-1])
        flat.addmm_(low.reshape(-1, low.shape[-1]), lora_b.to(low.dtype).T, alpha=scaling)
        ctx.save_for_backward(weight, low, lora_b)
        ctx.state, ctx.scaling = state, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of ``x``, ``low`` and B."""
        (grad,) = grads
        weight, low, lora_b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _whole(weight, ctx.state, grad.dtype)
        grad_low = (flat @ lora_b.to(grad.dtype)).mul_(ctx.scaling).view(low.shape)
        grad_b = None
        if ctx.needs_input_grad[5]:
            grad_b = (flat.T @ low.reshape(-1, low.shape[-1])).to(lora_b.dtype).mul_(ctx.scaling)
        return grad_x, None, None, None, grad_low, grad_b, None


class _LowRank(torch.autograd.Function):
    """``x W^T + bias + scaling * (x A^T) B^T`` where nothing is dropped; W and bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        state: Any,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
    ) -> Tensor:
        """Compute (..., O) from ``x`` (..., I), ``weight`` (O, I), A (R, I) and B (O, R)."""
        out = linear(x, _whole(weight, state, x.dtype), bias)
        low = x.reshape(-1, x.shape[-1]) @ lora_a.to(x.dtype).T
        out.view(-1, out.shape[-1]).addmm_(low, lora_b.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(x, weight, low, lora_a, lora_b)
        ctx.state, ctx.scaling = state, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of ``x``, A and B: that of ``x`` in one tensor, without a sum of two."""
        (grad,) = grads
        x, weight, low, lora_a, lora_b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_low = (flat @ lora_b.to(grad.dtype)).mul_(ctx.scaling)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            wide = flat @ _whole(weight, ctx.state, grad.dtype)
            grad_x = wide.addmm_(grad_low, lora_a.to(grad.dtype)).view(x.shape)
        if ctx.needs_input_grad[4]:
            grad_a = (grad_low.T @ x.reshape(-1, x.shape[-1])).to(lora_a.dtype)
        if ctx.needs_input_grad[5]:
            grad_b = (flat.T @ low).to(lora_b.dtype).mul_(ctx.scaling)
        return grad_x, None, None, None, grad_a, grad_b, None
