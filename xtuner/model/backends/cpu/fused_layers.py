"""RMS norms, rotary embeddings and SwiGLU of a model's layers, on a CPU, in fewer operations.

Under autocast transformers' own code keeps these in float32, in many operations; each projection
then casts the same input again, and so does its backward pass. Here each is one function (see
``kernels``) that computes in float32 and returns what the projections read. Without autocast
float32 tensors take the same functions, which read and write memory less often and keep less for
the backward pass. Modules are recognized by their structure, and each is compared once with the
original; one that differs is left alone.

Shapes: B batch, S tokens, H heads, D width of a head, W width of the norm.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xtuner.model.backends.cpu.kernels import (
    apply_rope,
    rms_norm,
    rms_norm_backward,
    swiglu,
    swiglu_backward,
)
from xtuner.utils.types import AutogradContext

SWIGLU = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""The parts of a SwiGLU layer, by the names that transformers gives them."""
ROTARY = "apply_rotary_pos_emb"
"""The function of this name in a model's module of transformers, where it has one."""


class Fused(NamedTuple):
    """How many modules of a model are fused."""

    norms: int
    mlps: int
    rotary: int
    """Functions, of which a model has one for all its layers."""


def apply_fused_layers(model: nn.Module) -> Fused:
    """Replace the forward of a model's RMS norms, SwiGLU layers and rotary embedding.

    Args:
        model: a transformers model; its modules keep their classes, names and weights.
    """
    norms, mlps, sources = 0, 0, set()
    for module in model.modules():
        sources.add(type(module).__module__)
        if isinstance(module.forward, (_Norm, _MLP)):
            continue
        offset = _weight_offset(module)
        if offset is not None:
            module.forward = _Norm(module, module.forward, offset)
            norms += 1
        elif _is_swiglu(module):
            module.forward = _MLP(module, module.forward)
            mlps += 1
    return Fused(norms, mlps, sum(_replace_rotary(sys.modules[source]) for source in sources))


def _compute_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of the products on a CPU; None where the original is called."""
    if x.device.type != "cpu":
        return None
    if torch.compiler.is_compiling():  # inductor fuses the original's operations, and more
        return None
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return x.dtype if x.dtype is torch.float32 else None


def _epsilon(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def _weight_offset(module: nn.Module) -> float | None:
    """What is added to the weight of an RMS norm (0, in Gemma 1); None for other modules."""
    named = dict(module.named_parameters())
    weight = named.get("weight")
    if list(named) != ["weight"] or weight is None or weight.ndim != 1:
        return None
    if not isinstance(_epsilon(module), float) or weight.is_meta or not weight.numel():
        return None
    stand_in, probe = _with_random_weight(module, weight.numel())
    try:
        theirs = stand_in(probe)
    except Exception:  # what is no norm, or a gated one, fails in many ways
        return None
    for offset in (0.0, 1.0):
        ours, _ = rms_norm(probe, stand_in.weight, _epsilon(module), offset, torch.float32)
        if theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5):
            return offset
    return None


def _with_random_weight(module: nn.Module, width: int) -> tuple[Any, Tensor]:
    """A norm whose weight is random, and rows for it, in float32 on the CPU.

    Its own weight, which may be the same number everywhere, tells little: not whether it is
    multiplied before the norm or after it.
    """
    generator = torch.Generator().manual_seed(0)
    stand_in = copy.copy(module)
    weight = nn.Parameter(torch.randn(width, generator=generator))
    stand_in._parameters = {"weight": weight}
    return stand_in, torch.randn(3, width, generator=generator).add_(0.5)


class _Norm:
    """The forward of an RMS norm, or the original where that does not apply."""

    def __init__(self, module: Any, original: Callable[..., Tensor], offset: float) -> None:
        self.module, self.original, self.offset = module, original, offset

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype = _compute_dtype(x)
        if dtype is None or args or kwargs:
            return self.original(x, *args, **kwargs)
        module = self.module
        return _RMSNorm.apply(x, module.weight, _epsilon(module), self.offset, dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext,
        x: Tensor,
        weight: Tensor,
        epsilon: float,
        offset: float,
        dtype: torch.dtype,
    ) -> Tensor:
        out, inverse = rms_norm(x, weight, epsilon, offset, dtype)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return out

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        with_weight = ctx.needs_input_grad[1]
        grad_x, grad_weight = rms_norm_backward(
            grads[0], x, weight, inverse, ctx.offset, with_weight
        )
        return grad_x, grad_weight, None, None, None


@torch.no_grad()
def _is_swiglu(module: nn.Module) -> bool:
    """Whether a module is ``down(silu(gate(x)) * up(x))``.

    The forward of its class is called with small layers in place of the module's, which may be
    large, in 4 bits, or on the meta device.
    """
    if "forward" in vars(module) or not all(hasattr(module, name) for name in SWIGLU):
        return False
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = {name: nn.Linear(4, 4) for name in SWIGLU[:3]}
        probe = torch.randn(3, 4)
    stand_in = SimpleNamespace(**layers, act_fn=module.act_fn)
    try:
        theirs = type(module).forward(stand_in, probe)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    gate, up, down = layers.values()
    ours = down(swiglu(gate(probe), up(probe)))
    return theirs.shape == ours.shape and torch.allclose(theirs, ours, atol=1e-6)


class _MLP:
    """The forward of a SwiGLU layer, or the original where that does not apply."""

    def __init__(self, module: Any, original: Callable[..., Tensor]) -> None:
        self.module, self.original = module, original

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _compute_dtype(x) is None or args or kwargs:
            return self.original(x, *args, **kwargs)
        module = self.module
        return module.down_proj(_SwiGLU.apply(module.gate_proj(x), module.up_proj(x)))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return swiglu_backward(grads[0], gate, up)


def _replace_rotary(source: ModuleType) -> bool:
    original = getattr(source, ROTARY, None)
    if original is None or isinstance(original, _Rotary) or not _is_plain_rotary(original, 8):
        return False
    setattr(source, ROTARY, _Rotary(original))
    return True


@torch.no_grad()
def _is_plain_rotary(original: Callable[..., Any], rotated: int) -> bool:
    """Whether a function rotates the halves of the first ``rotated`` numbers of each head.

    All 8 of a head in most models, fewer where a part of it is not rotated.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, angles = (
        torch.randn(*shape, generator=generator)
        for shape in ((1, 4, 3, 8), (1, 2, 3, 8), (1, 3, rotated // 2))
    )
    angles = torch.cat((angles, angles), -1)
    try:
        theirs = original(query, key, angles.cos(), angles.sin())
        ours = [
            apply_rope(x, angles.cos()[:, None], angles.sin()[:, None], torch.float32)
            for x in (query, key)
        ]
        return all(
            one.shape == other.shape and torch.allclose(one, other, atol=1e-5)
            for one, other in zip(theirs, ours, strict=True)
        )
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False


class _Rotary:
    """A model's ``apply_rotary_pos_emb``, or the original where that does not apply."""

    def __init__(self, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)  # its signature
        self.original = original
        self.partial = _is_plain_rotary(original, 4)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 4:  # another layout, or queries alone
            return self.original(*args, **kwargs)
        q, k, cos, sin = args
        dtype = _compute_dtype(q)
        plain = not cos.requires_grad and cos.ndim == 3
        plain = plain and (self.partial or cos.shape[-1] == q.shape[-1])
        if dtype is None or not plain:
            return self.original(q, k, cos, sin)
        cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
        return tuple(_RoPE.apply(x, cos, sin, dtype) for x in (q, k))


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return apply_rope(x, cos, sin, dtype)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        half = sin.shape[-1] // 2
        # the same rotation the other way; the two halves of the sines need not be equal
        back = torch.cat((sin[..., half:], sin[..., :half]), -1).neg_()
        return apply_rope(grads[0], cos, back, ctx.dtype), None, None, None
