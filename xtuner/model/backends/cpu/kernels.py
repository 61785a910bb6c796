"""Element-wise kernels of a layer: RMS norm, rotary embedding, SwiGLU, softmax backward.

Each is written once, in plain torch. Run eagerly it reads and writes memory at every operation;
compiled (``compile_kernels``) it does so once. Matrix products and attention are not compiled:
oneDNN and torch's own kernels are faster. So there is little to compile, once for all layers and
all lengths.

Shapes: B batch, S tokens, H heads, D width of a head, R rotated part of it, W width of the norm.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import silu

from xtuner.utils.lang import tr

logger = logging.getLogger(__name__)
Args = ParamSpec("Args")
Result = TypeVar("Result")


class Kernel(Generic[Args, Result]):
    """A function that runs eagerly or compiled.

    Args:
        function: a function of tensors. Its docstring names those that it changes in place.
    """

    compiled = False
    """Whether kernels run compiled: all of them or none."""
    failure = ""
    """Why they do not, though they should."""

    def __init__(self, function: Callable[Args, Result]) -> None:
        self.plain = function
        self._compiled: Callable[Args, Result] | None = None

    def __call__(self, *args: Args.args, **kwargs: Args.kwargs) -> Result:
        if not Kernel.compiled or torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        from torch._dynamo.exc import TorchDynamoException

        if self._compiled is None:
            self._compiled = torch.compile(self.plain, dynamic=True)
        try:
            return self._compiled(*args, **kwargs)
        except TorchDynamoException as error:  # no compiler, or one that fails
            Kernel.compiled, Kernel.failure = False, explained(str(error))
            logger.warning(tr("compile: not compiled, as this failed: %s"), Kernel.failure)
            return self.plain(*args, **kwargs)


PACKAGES = {
    "Python.h": "python3-dev",
    "omp.h": "libomp-dev",
    "-lgomp": "libgomp1",
    "-lomp": "libomp-dev",
    "C++ compiler": "g++",
}
"""What an error of a compiler names, and the package of Debian and Ubuntu that has it."""


def explained(error: str) -> str:
    """What a compiler says in an error of torch, and the package that is missing."""
    said = re.search(r"(?:error: |cannot find ).*", error)
    short = said.group() if said else " ".join(error.split()[:30])
    package = next((package for name, package in PACKAGES.items() if name in short), None)
    if package is None:
        return short
    return tr("{error} (apt-get install {package})", error=short, package=package)


def compile_kernels() -> None:
    """Run all kernels compiled from now on; each is compiled at its first call.

    Without a C++ compiler they run eagerly, with a warning.
    """
    Kernel.compiled = True


@Kernel
def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``x / sqrt(mean(x^2) + epsilon) * (weight + offset)``, computed in float32.

    Args:
        x: (..., W).
        weight: (W,).
        epsilon: keeps the root above 0.
        offset: 1 where the weight is stored as its distance from 1 (Gemma), otherwise 0.
        dtype: of the result.

    Returns:
        (..., W), and one over the root mean square, (..., 1), in float32.
    """
    wide = x.float()
    square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square()
    inverse = (square / x.shape[-1] + epsilon).rsqrt()
    return (wide * inverse).mul_(weight.float() + offset).to(dtype), inverse


@Kernel
def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float, with_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``rms_norm`` with respect to ``x`` and, ``with_weight``, the weight."""
    width = x.shape[-1]
    wide, scale = x.float(), weight.float() + offset
    wide_grad = grad.float()
    product = (wide * inverse).mul_(wide_grad)
    share = (product @ scale).unsqueeze(-1) * inverse.square() / -width
    grad_weight = product.reshape(-1, width).sum(0).to(weight.dtype) if with_weight else None
    grad_x = (wide_grad * scale).mul_(inverse).addcmul_(wide, share)
    return grad_x.to(x.dtype), grad_weight


@Kernel
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, S, D), the halves of its first R numbers rotated by the angles (B, 1, S, R)."""
    rotated = cos.shape[-1]
    first, second = x[..., :rotated].float().chunk(2, -1)
    (cos_first, cos_second), (sin_first, sin_second) = cos.chunk(2, -1), sin.chunk(2, -1)
    parts = [
        (first * cos_first).addcmul_(second, sin_first, value=-1).to(dtype),
        (second * cos_second).addcmul_(first, sin_second).to(dtype),
    ]
    if rotated < x.shape[-1]:
        parts.append(x[..., rotated:].to(dtype))
    return torch.cat(parts, -1)


@Kernel
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    return silu(gate).mul_(up)


@Kernel
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``swiglu`` with respect to ``gate`` and ``up``."""
    return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)


@Kernel
def rowwise_dot(a: Tensor, b: Tensor) -> Tensor:
    """The dot products of the rows of two (..., D): (...) in float32."""
    return (a.float() * b.float()).sum(-1)


@Kernel
def softmax_backward(
    weights: Tensor, grad_weights: Tensor, lse: Tensor, dot: Tensor, scale: float
) -> None:
    """The backward pass of attention's softmax; changes its first two arguments in place.

    Args:
        weights: (B, S, S) queries times keys; becomes the attention weights.
        grad_weights: (B, S, S) gradients of the attention weights; becomes those of ``weights``.
        lse: (B, S, 1) log-sum-exp of the scores of each token.
        dot: (B, S, 1) dot product of the output and its gradient, of each token.
        scale: factor that makes scores of products.
    """
    probabilities = torch.exp(weights.float() * scale - lse)
    grad_weights.copy_(probabilities * (grad_weights.float() - dot) * scale)
    weights.copy_(probabilities)


@Kernel
def transpose_contiguous(matrix: Tensor) -> Tensor:
    """The transpose of a matrix, contiguous in memory."""
    return matrix.t().contiguous()
