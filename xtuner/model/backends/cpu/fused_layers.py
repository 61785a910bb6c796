"""RMS norms, rotary embeddings and gates of a model's layers, on a CPU, without needless casts.

Under autocast transformers' own code keeps these in float32, in many steps; every projection then
casts the same input again, and so do the gradients on their way back. Here each is one function
(see ``kernels``) that computes in float32 and writes what the projections read. Which modules are
meant is found by their structure, and each is compared once with the original: what does not agree
stays as it is.

Shapes: B batch, S tokens, H heads, D width of a head, W width of the norm.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.model.backends.cpu.kernels import gated, gated_back, normed, normed_back, turned

GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""The parts of a gated layer, by the names that transformers gives them."""
ROTARY = "apply_rotary_pos_emb"
"""The function of this name in a model's module of transformers, where it has one."""


def speed_up(model: nn.Module) -> tuple[int, int, int]:
    """Let the norms, gated layers and rotary embeddings of a model compute in the quick way.

    Args:
        model: a transformers model; its modules keep their classes, names and weights.

    Returns:
        How many norms do, how many gated layers, and how many kinds of rotary embeddings.
    """
    norms, gates, sources = 0, 0, set()
    for module in model.modules():
        sources.add(type(module).__module__)
        if isinstance(module.forward, (_Norm, _Gated)):
            continue
        offset = _weight_offset(module)
        if offset is not None:
            module.forward = _Norm(module, module.forward, offset)
            norms += 1
        elif _is_gated(module):
            module.forward = _Gated(module, module.forward)
            gates += 1
    return norms, gates, sum(_replace_rotary(sys.modules[source]) for source in sources)


def _compute_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast's products read, on a CPU; None where the original is to compute."""
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return None
    if torch.compiler.is_compiling():  # which joins the original's steps, and more
        return None
    return torch.get_autocast_dtype("cpu")


def _epsilon(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def _weight_offset(module: nn.Module) -> float | None:
    """What is added to the weight of an RMS norm (0, or 1 with Gemma); None for other modules."""
    named = dict(module.named_parameters())
    weight = named.get("weight")
    if list(named) != ["weight"] or weight is None or weight.ndim != 1:
        return None
    if not isinstance(_epsilon(module), float) or weight.is_meta or not weight.numel():
        return None
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(3, weight.numel(), generator=generator).add_(0.5).to(weight)
    with torch.autocast(weight.device.type, enabled=False):
        try:
            theirs = module(probe).float()
        except (RuntimeError, TypeError, ValueError):
            return None
        for offset in (0.0, 1.0):
            ours, _ = normed(probe, weight, _epsilon(module), offset, torch.float32)
            if theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=2e-2, atol=1e-3):
                return offset
    return None


class _Norm:
    """The forward of one norm; the original where ours does not apply."""

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
        ctx: Any, x: Tensor, weight: Tensor, epsilon: float, offset: float, dtype: torch.dtype
    ) -> Tensor:
        out, inverse = normed(x, weight, epsilon, offset, dtype)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, inverse = ctx.saved_tensors
        with_weight = ctx.needs_input_grad[1]
        grad_x, grad_weight = normed_back(grads[0], x, weight, inverse, ctx.offset, with_weight)
        return grad_x, grad_weight, None, None, None


@torch.no_grad()
def _is_gated(module: Any) -> bool:
    """Whether a module is ``down(silu(gate(x)) * up(x))``.

    Its class's own code is run on small layers in place of the module's, which may be large, in
    4 bits, or not here at all.
    """
    if "forward" in vars(module) or not all(hasattr(module, name) for name in GATED):
        return False
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = {name: nn.Linear(4, 4) for name in GATED[:3]}
        probe = torch.randn(3, 4)
    stand_in = SimpleNamespace(**layers, act_fn=module.act_fn)
    try:
        theirs = type(module).forward(stand_in, probe)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    gate, up, down = layers.values()
    ours = down(gated(gate(probe), up(probe)))
    return theirs.shape == ours.shape and torch.allclose(theirs, ours, atol=1e-6)


class _Gated:
    """The forward of one gated layer; the original where ours does not apply."""

    def __init__(self, module: Any, original: Callable[..., Tensor]) -> None:
        self.module, self.original = module, original

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _compute_dtype(x) is None or args or kwargs:
            return self.original(x, *args, **kwargs)
        module = self.module
        return module.down_proj(_Gate.apply(module.gate_proj(x), module.up_proj(x)))


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, up = ctx.saved_tensors
        return gated_back(grads[0], gate, up)


def _replace_rotary(source: Any) -> bool:
    original = getattr(source, ROTARY, None)
    if original is None or isinstance(original, _Rotary) or not _is_plain_rotary(original):
        return False
    setattr(source, ROTARY, _Rotary(original))
    return True


@torch.no_grad()
def _is_plain_rotary(original: Callable[..., Any]) -> bool:
    """Whether a function turns the halves of each head, and all of it, by the given angles."""
    generator = torch.Generator().manual_seed(0)
    query, key, angles = (
        torch.randn(*shape, generator=generator)
        for shape in ((1, 4, 3, 8), (1, 2, 3, 8), (1, 3, 4))
    )
    angles = torch.cat((angles, angles), -1)
    try:
        theirs = original(query, key, angles.cos(), angles.sin())
        ours = [
            turned(x, angles.cos()[:, None], angles.sin()[:, None], torch.float32)
            for x in (query, key)
        ]
        return all(
            one.shape == other.shape and torch.allclose(one, other, atol=1e-5)
            for one, other in zip(theirs, ours, strict=True)
        )
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False


class _Rotary:
    """Stands for a model's ``apply_rotary_pos_emb``; the original where ours does not apply."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        dtype = _compute_dtype(q)
        plain = not args and not kwargs and not cos.requires_grad and cos.ndim == 3
        if dtype is None or not plain:
            return self.original(q, k, cos, sin, *args, **kwargs)
        cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
        return tuple(_Turn.apply(x, cos, sin, dtype) for x in (q, k))


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return turned(x, cos, sin, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        cos, sin = ctx.saved_tensors
        half = sin.shape[-1] // 2
        # the same turn the other way; the two halves of the sines need not be equal
        back = torch.cat((sin[..., half:], sin[..., :half]), -1).neg_()
        return turned(grads[0], cos, back, ctx.dtype), None, None, None
