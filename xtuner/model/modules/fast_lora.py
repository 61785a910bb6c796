"""LoRA on plain linear layers without its usual cost.

peft adds ``scaling * B(A(dropout(x)))`` to the frozen layer's output in steps of its own: casts, a
product, a multiplication and a sum, each over the whole width. Here the second product is added
into the frozen layer's output as it is made (one ``addmm``), and the frozen weight has no gradient
to be computed. Everything else peft can do (DoRA, merged or switched-off adapters, several at
once, quantised layers) is left to peft.

Shapes: N tokens, I and O widths of input and output, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def speed_up(model: nn.Module) -> int:
    """Let the plain LoRA layers of a model compute in the quick way.

    Args:
        model: a ``PeftModel``; its layers keep peft's classes, names and weights.

    Returns:
        How many layers do.
    """
    from peft.tuners.lora.layer import Linear

    count = 0
    for layer in model.modules():
        if type(layer) is Linear and type(layer.get_base_layer()) is nn.Linear:
            layer.forward = _Forward(layer, layer.forward)  # type: ignore[method-assign]
            count += 1
    return count


class _Forward:
    """The forward of one layer; peft's own where ours does not apply."""

    def __init__(self, layer: Any, of_peft: Callable[..., Tensor]) -> None:
        self.layer, self.of_peft = layer, of_peft

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self._adapter()
        dtype = _compute_dtype(x)
        if args or kwargs or name is None or dtype is None:
            return self.of_peft(x, *args, **kwargs)
        layer, base = self.layer, self.layer.get_base_layer()
        dropped = layer.lora_dropout[name](x)
        lora_a, lora_b = layer.lora_A[name].weight, layer.lora_B[name].weight
        with torch.autocast(x.device.type, enabled=False):
            bias = None if base.bias is None else base.bias.to(dtype)
            frozen = (base.weight.detach().to(dtype), bias)
            scaling = float(layer.scaling[name])
            out: Tensor
            if dropped is x:
                out = _LowRank.apply(x.to(dtype), *frozen, lora_a, lora_b, scaling)
            else:
                low = linear(dropped.to(dtype), lora_a.to(dtype))
                out = _AddLowRank.apply(x.to(dtype), *frozen, low, lora_b, scaling)
        return out

    def _adapter(self) -> str | None:
        """The one adapter that is to be applied plainly; None where there is none."""
        layer = self.layer
        if layer.merged or layer.disable_adapters or len(layer.active_adapters) != 1:
            return None
        (name,) = layer.active_adapters
        if name not in layer.lora_A or name in getattr(layer, "lora_variant", {}):
            return None
        plain = not (layer.fan_in_fan_out or layer.lora_bias.get(name, False))
        weight = layer.base_layer.weight
        whole = weight.ndim == 2  # ZeRO-3 leaves nothing of it here until the layer is called
        return str(name) if plain and whole and not weight.requires_grad else None


class _AddLowRank(torch.autograd.Function):
    """``x W^T + bias + scaling * low B^T``; W and bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor,
        lora_b: Tensor,
        scaling: float,
    ) -> Tensor:
        """Compute (..., O) from ``x`` (..., I), ``weight`` (O, I), ``low`` (..., R), B (O, R)."""
        out = linear(x, weight, bias)
        flat = out.view(-1, out.shape[-1])
        flat.addmm_(low.reshape(-1, low.shape[-1]), lora_b.to(low.dtype).T, alpha=scaling)
        ctx.save_for_backward(weight, low, lora_b)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of ``x``, ``low`` and B."""
        (grad,) = grads
        weight, low, lora_b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_low = (flat @ lora_b.to(grad.dtype)).mul_(ctx.scaling).view(low.shape)
        grad_b = None
        if ctx.needs_input_grad[4]:
            grad_b = (flat.T @ low.reshape(-1, low.shape[-1])).to(lora_b.dtype).mul_(ctx.scaling)
        return grad_x, None, None, grad_low, grad_b, None


class _LowRank(torch.autograd.Function):
    """``x W^T + bias + scaling * (x A^T) B^T`` where nothing is dropped; W and bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
    ) -> Tensor:
        """Compute (..., O) from ``x`` (..., I), ``weight`` (O, I), A (R, I) and B (O, R)."""
        out = linear(x, weight, bias)
        low = x.reshape(-1, x.shape[-1]) @ lora_a.to(x.dtype).T
        out.view(-1, out.shape[-1]).addmm_(low, lora_b.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(x, weight, low, lora_a, lora_b)
        ctx.scaling = scaling
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
            wide = flat @ weight
            grad_x = wide.addmm_(grad_low, lora_a.to(grad.dtype)).view(x.shape)
        if ctx.needs_input_grad[3]:
            grad_a = (grad_low.T @ x.reshape(-1, x.shape[-1])).to(lora_a.dtype)
        if ctx.needs_input_grad[4]:
            grad_b = (flat.T @ low).to(lora_b.dtype).mul_(ctx.scaling)
        return grad_x, None, None, grad_a, grad_b, None


def _compute_dtype(x: Tensor) -> torch.dtype | None:
    """What the products are computed in; None where peft computes in another way."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype if x.dtype == torch.float32 else None
