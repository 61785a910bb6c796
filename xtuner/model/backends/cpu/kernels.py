"""The steps of a layer that go over numbers one by one: RMS norm, rotary, gate, scores.

Each is written once, in plain torch. As it stands it goes over memory at every operation; compiled
(``compile_kernels``) it goes over it once. Products and attention are not compiled: torch's
libraries are quicker at them, so there is little to compile, and that once for all layers and all
lengths.

Shapes: B batch, S tokens, H heads, D width of a head, W width of the norm.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import silu

logger = logging.getLogger(__name__)
Args = ParamSpec("Args")
Made = TypeVar("Made")


class Kernel(Generic[Args, Made]):
    """A function that runs as it is or, once that was asked for, compiled.

    Args:
        function: takes and gives tensors; those that it changes, its text names.
    """

    compiled = False
    """Whether kernels run compiled: all or none of them."""

    def __init__(self, function: Callable[Args, Made]) -> None:
        self.plain = function
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Args.args, **kwargs: Args.kwargs) -> Made:
        if not Kernel.compiled or torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        from torch._dynamo.exc import TorchDynamoException

        if self._compiled is None:
            self._compiled = torch.compile(self.plain, dynamic=True)
        try:
            return self._compiled(*args, **kwargs)
        except TorchDynamoException as error:  # no compiler, or one that fails
            Kernel.compiled = False
            logger.warning("compile: not compiled, as this failed: %s", _shortened(error))
            return self.plain(*args, **kwargs)


def _shortened(error: Exception) -> str:
    """What an error says before it goes into details."""
    return " ".join(str(error).split()[:30])


def compile_kernels() -> None:
    """Let all kernels run compiled from now on; each is when it is first called.

    Where there is no compiler they go on as they are, with a warning.
    """
    Kernel.compiled = True


@Kernel
def normed(
    x: Tensor, weight: Tensor, epsilon: float, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``x / sqrt(mean(x^2) + epsilon) * (weight + offset)``, computed in float32.

    Args:
        x: (..., W).
        weight: (W,).
        epsilon: keeps the root from 0.
        offset: 1 where the weight is kept as its distance from 1 (Gemma).
        dtype: of the outcome.

    Returns:
        (..., W), and one over the root mean square, (..., 1), in float32.
    """
    wide = x.float()
    square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square()
    inverse = (square / x.shape[-1] + epsilon).rsqrt()
    return (wide * inverse).mul_(weight.float() + offset).to(dtype), inverse


@Kernel
def normed_back(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float, with_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``normed`` with respect to ``x`` and, where asked for, the weight."""
    width = x.shape[-1]
    wide, scale = x.float(), weight.float() + offset
    grad = grad.to(torch.float32, copy=True)
    product = (wide * inverse).mul_(grad)
    share = (product @ scale).unsqueeze(-1) * inverse.square() / -width
    grad_weight = product.reshape(-1, width).sum(0).to(weight.dtype) if with_weight else None
    grad_x = grad.mul_(scale).mul_(inverse).addcmul_(wide, share)
    return grad_x.to(x.dtype), grad_weight


@Kernel
def turned(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, S, D) with the halves of each head turned by the angles, (B, 1, S, D)."""
    one, other = x.float().chunk(2, -1)
    (cos_one, cos_other), (sin_one, sin_other) = cos.chunk(2, -1), sin.chunk(2, -1)
    ahead = (one * cos_one).addcmul_(other, sin_one, value=-1)
    behind = (other * cos_other).addcmul_(one, sin_other)
    return torch.cat((ahead.to(dtype), behind.to(dtype)), -1)


@Kernel
def gated(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    return silu(gate).mul_(up)


@Kernel
def gated_back(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``gated`` with respect to ``gate`` and ``up``."""
    return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)


@Kernel
def dotted(one: Tensor, other: Tensor) -> Tensor:
    """The dot products of two (..., D), (...) in float32."""
    return (one.float() * other.float()).sum(-1)


@Kernel
def scores_back(weights: Tensor, slopes: Tensor, norm: Tensor, dot: Tensor, scale: float) -> None:
    """From the products to the gradients of attention; changes its first two, in place.

    Args:
        weights: (B, S, S) queries times keys; becomes the attention weights.
        slopes: (B, S, S) gradients of the output times values; becomes those of the products.
        norm: (B, S, 1), log-sum-exp of each token's scores.
        dot: (B, S, 1), output times its gradient, of each token.
        scale: factor on the products.
    """
    found = torch.exp(weights.float() * scale - norm)
    slopes.copy_(found * (slopes.float() - dot) * scale)
    weights.copy_(found)


@Kernel
def turned_over(matrix: Tensor) -> Tensor:
    """A matrix with rows for columns, in memory too."""
    return matrix.t().contiguous()
