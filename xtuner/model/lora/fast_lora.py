"""LoRA and QLoRA on linear layers without their usual cost.

peft adds ``scaling * B(A(dropout(x)))`` to the frozen layer's output in steps of its own: casts, a
product, a multiplication and a sum (of a copy, over 4-bit layers), each over the whole width. Here
the second product is added to the frozen layer's output in place (one ``addmm``), and no gradient
of the frozen weight is computed. Layers with one input (query, key and value; gate and up) are
computed together: their A in one product, the gradient of their input in one tensor. They share
one dropout of it, where peft draws one for each: each layer's output and gradients have the same
distribution as with peft.

A 4-bit weight is dequantized once in forward and once in backward, to the dtype of the product; a
weight that autocast casts is cast once in each. Neither is kept in between. Everything else that
peft can do (DoRA, merged or disabled adapters, several at once, 8-bit layers) is left to peft.

Shapes: N tokens, I and O widths of input and output, R rank.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from xtuner.utils.types import AutogradContext

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that are called with the same input, by the names that transformers gives
them: their products with A are one."""


def apply_fused_lora(model: nn.Module) -> int:
    """Replace the forward of a model's LoRA layers.

    Args:
        model: a transformers model with peft's layers, which keep classes, names and weights.

    Returns:
        How many layers were replaced.
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
    for parent in model.modules():
        for names in SIBLINGS:
            forwards = [getattr(getattr(parent, name, None), "forward", None) for name in names]
            quick = [each for each in forwards if isinstance(each, _Forward)]
            if len(quick) > 1:
                _Siblings(quick)
    return count


@dataclass(frozen=True)
class _Part:
    """The tensors and settings of a layer; W and bias are frozen.

    Args:
        dtype: of the products.
        weight: W (O, I) as it is stored.
        state: the ``QuantState`` of W, where it is in 4 bits.
        bias: (O,) in ``dtype``, or None.
        lora_a: A (R, I).
        lora_b: B (O, R).
        scaling: factor of the low-rank product.
        rate: the probability with which an element of the input of the low-rank product is dropped.
    """

    dtype: torch.dtype
    weight: Tensor
    state: Any
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    rate: float


class _Siblings:
    """Layers with one input: the first that is called computes the outputs of all of them."""

    def __init__(self, members: list[_Forward]) -> None:
        self.members = members
        self._input: Tensor | None = None
        self._ready: dict[int, Tensor] = {}
        for each in members:
            each.siblings = self

    def parts(self, first: _Forward, part: _Part, x: Tensor) -> list[tuple[_Forward, _Part]]:
        """The layers computed together with ``first``, and first among them, with their parts."""
        if self._ready:  # a layer that has weights but is not called: never again
            self.members = []
        self._input, self._ready = None, {}
        found = [(first, part)]
        for each in self.members:
            other = part if each is first else each.part(x)
            # computed by peft, in another dtype, or with another dropout of the input
            if other is None or other.dtype != part.dtype or other.rate != part.rate:
                return [(first, part)]
            if each is not first:
                found.append((each, other))
        return found

    def keep(self, x: Tensor, outputs: dict[int, Tensor]) -> None:
        """Keep the outputs of the other layers until they are called."""
        if outputs:
            self._input, self._ready = x, outputs

    def take(self, layer: _Forward, x: Tensor) -> Tensor | None:
        """The output of a layer for this very input, if it was computed before."""
        if self._input is not x:
            return None
        found = self._ready.pop(id(layer), None)
        if not self._ready:
            self._input = None
        return found


class _Forward:
    """The forward of a layer, or peft's where that does not apply."""

    def __init__(self, layer: Any, of_peft: Callable[..., Tensor]) -> None:
        self.layer, self.of_peft = layer, of_peft
        self.siblings: _Siblings | None = None

    def __call__(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        part = None if args or kwargs else self.part(x)
        if part is None:
            return self.of_peft(x, *args, **kwargs)
        group = [(self, part)]
        if self.siblings is not None:
            found = self.siblings.take(self, x)
            if found is not None:
                return found
            group = self.siblings.parts(self, part, x)
        narrow = x.to(part.dtype).reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            dropped = dropout(x, part.rate).to(part.dtype) if part.rate else None
            dropped = None if dropped is None else dropped.reshape(narrow.shape)
            tensors = [(p.weight, p.bias, p.lora_a, p.lora_b) for _, p in group]
            rules = [(p.state, p.scaling) for _, p in group]
            inputs = (narrow, dropped, *itertools.chain(*tensors))
            lows = _LowRank.apply(*inputs)
            outs = _Sum.apply(lows, rules, *inputs)
        # bitsandbytes returns the dtype of the input, other layers that of the product
        outs = [out.view(*x.shape[:-1], out.shape[-1]) for out in outs]
        made = {
            id(each): out if p.state is None else out.to(x.dtype)
            for (each, p), out in zip(group, outs, strict=True)
        }
        own = made.pop(id(self))
        if self.siblings is not None:
            self.siblings.keep(x, made)
        return own

    def part(self, x: Tensor) -> _Part | None:
        """The tensors and settings for ``x``; None where peft computes it."""
        name = self._adapter()
        dtype = None if name is None else self._compute_dtype(x, name)
        if name is None or dtype is None:
            return None
        layer, base = self.layer, self.layer.get_base_layer()
        chosen = layer.lora_dropout[name]
        return _Part(
            dtype,
            base.weight.detach(),
            _state_of_4bits(base),
            None if base.bias is None else base.bias.to(dtype),
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            float(layer.scaling[name]),
            float(getattr(chosen, "p", 0.0)) if chosen.training else 0.0,
        )

    def _adapter(self) -> str | None:
        """The one active, unmerged, plain adapter; None where there is no such one."""
        layer = self.layer
        if layer.merged or layer.disable_adapters or len(layer.active_adapters) != 1:
            return None
        (name,) = layer.active_adapters
        if name not in layer.lora_A or name in getattr(layer, "lora_variant", {}):
            return None
        base = layer.get_base_layer()
        plain = not (layer.fan_in_fan_out or layer.lora_bias.get(name, False))
        gathered = base.weight.ndim == 2  # ZeRO-3 gathers it only when the layer is called
        frozen = not any(each.requires_grad for each in base.parameters(recurse=False))
        return str(name) if plain and gathered and frozen else None

    def _compute_dtype(self, x: Tensor, name: str) -> torch.dtype | None:
        """The dtype of the products; None where peft computes them in another way."""
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
    """The ``QuantState`` of a 4-bit layer; None for other layers, and layouts without backward."""
    state = getattr(base.weight, "quant_state", None)
    return None if getattr(state, "packing_format_for_cpu", False) else state


def _dequantized(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """A weight as it is stored -> (O, I) in the dtype of a product."""
    if state is None:
        return weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    wanted = copy.copy(state)
    wanted.dtype = dtype  # by its own it would be that of the weight before it was quantised
    dequantized: Tensor = dequantize_4bit(weight, wanted)
    return dequantized


def dropout(x: Tensor, rate: float) -> Tensor:
    """Drop elements of ``x`` with probability ``rate`` and scale the others, as ``nn.Dropout``.

    On a CPU torch draws a Bernoulli number for each element, which takes most of the time of a
    low-rank product; there the bits of few random numbers are taken. The rate is then a multiple of
    2^-16, and the scale that of this rate.
    """
    if x.device.type != "cpu":
        return nn.functional.dropout(x, rate)
    out: Tensor = _BitDropout.apply(x, rate)
    return out


class _BitDropout(torch.autograd.Function):
    """Dropout with 16 random bits for each element."""

    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, rate: float) -> Tensor:
        """Drop elements of ``x``, of any shape, with probability ``rate``."""
        numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        bits = numbers.random_(-(2**63), None).view(torch.int16)[: x.numel()].view(x.shape)
        dropped = round(rate * 2**16)
        ctx.scale = 2**16 / max(1, 2**16 - dropped)
        kept = bits >= dropped - 2**15 if dropped < 2**16 else torch.zeros_like(bits).bool()
        ctx.save_for_backward(kept)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> Any:
        """The gradient of ``x``."""
        (kept,) = ctx.saved_tensors
        return (grads[0] * kept).mul_(ctx.scale), None


class _LowRank(torch.autograd.Function):
    """``d A^T`` of each of G layers with one input ``x``; ``d`` is it after dropout.

    It also keeps all that ``_Sum`` needs for its backward pass. Activation checkpointing stops
    computing again as soon as all is kept: before the product with W if the layer is the last one.
    """

    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, dropped: Tensor | None, *parts: Any) -> Tensor:
        """Compute (N, R of all layers); arguments as for ``_Sum``."""
        weights, every_a, every_b = (parts[kind::4] for kind in (0, 2, 3))
        joined = torch.cat([a.to(x.dtype) for a in every_a])
        narrow = [b.to(x.dtype) for b in every_b]
        adapted = x if dropped is None else dropped
        lows = adapted @ joined.T
        ctx.save_for_backward(adapted, joined, lows, *weights, *narrow)
        ctx.set_materialize_grads(False)
        return lows

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> Any:
        """Nothing: ``_Sum`` computes all gradients."""
        return (None,) * len(ctx.needs_input_grad)


class _Sum(torch.autograd.Function):
    """``x W^T + bias + scaling * (d A^T) B^T`` of each of G layers; all W and biases are frozen.

    The layers have one input ``x``, and ``d`` is it after dropout: its products with all A are one
    product, and so are those of its gradient, which is made in one tensor.
    """

    @staticmethod
    def forward(
        ctx: AutogradContext,
        lows: Tensor,
        rules: list[tuple[Any, float]],
        x: Tensor,
        dropped: Tensor | None,
        *parts: Any,
    ) -> tuple[Tensor, ...]:
        """Compute (N, O) of each layer.

        Args:
            ctx: of autograd.
            lows: the result of ``_LowRank``.
            rules: of each layer the ``QuantState`` of W, if it is in 4 bits, and the scaling.
            x: (N, I).
            dropped: (N, I), ``x`` after dropout; None without dropout.
            *parts: of each layer W (O, I), bias (O,) or None, A (R, I) and B (O, R).
        """
        weights, biases, every_a, every_b = (parts[kind::4] for kind in range(4))
        ctx.ranks = [len(a) for a in every_a]
        outs = []
        for weight, bias, b, low, (state, scaling) in zip(
            weights, biases, every_b, lows.split(ctx.ranks, 1), rules, strict=True
        ):
            out = linear(x, _dequantized(weight, state, x.dtype), bias)
            outs.append(out.addmm_(low, b.to(x.dtype).T, alpha=scaling))
        ctx.low_rank = lows.grad_fn
        ctx.has_dropout, ctx.rules = dropped is not None, rules
        ctx.dtypes = [(a.dtype, b.dtype) for a, b in zip(every_a, every_b, strict=True)]
        ctx.set_materialize_grads(False)  # a layer that is not called has none
        return tuple(outs)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> Any:
        """Gradients of ``x`` and ``dropped``, and of each layer's A and B."""
        adapted, joined, lows, *saved = ctx.low_rank.saved_tensors
        weights, every_b = saved[: len(ctx.rules)], saved[len(ctx.rules) :]
        found: list[Tensor | None] = [None] * (4 * len(ctx.rules))
        low_grad = torch.zeros_like(lows)
        for place, (grad, b, low, of_low) in enumerate(
            zip(
                grads,
                every_b,
                lows.split(ctx.ranks, 1),
                low_grad.split(ctx.ranks, 1),
                strict=True,
            )
        ):
            scaling = ctx.rules[place][1]
            if grad is not None:
                of_low.addmm_(grad, b, beta=0, alpha=scaling)
                found[4 * place + 3] = (grad.T @ low).to(ctx.dtypes[place][1]).mul_(scaling)
        grads_a = (low_grad.T @ adapted).split(ctx.ranks)
        grad_x = grad_dropped = None
        with_x = ctx.needs_input_grad[2]
        if with_x and ctx.has_dropout:
            grad_dropped = low_grad @ joined
        elif with_x:
            grad_x = low_grad @ joined
        for place, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            if grad is None:
                continue
            found[4 * place + 2] = grads_a[place].to(ctx.dtypes[place][0])
            if with_x:
                matrix = _dequantized(weight, ctx.rules[place][0], grad.dtype)
                grad_x = grad @ matrix if grad_x is None else grad_x.addmm_(grad, matrix)
        return None, None, grad_x, grad_dropped, *found
