"""liger-kernel's RMS norms, rotary embeddings and SwiGLU, on a GPU, where it is installed.

liger-kernel knows which modules of which architecture its kernels replace. It also replaces
functions and classes of transformers for the whole process: those are restored, and its kernels in
this model are called for tensors on a GPU only, after they have once been compared with the
original on a few rows. Its loss is not used: ours skips unsupervised tokens.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.model.backends import environment
from xtuner.utils.lang import tr

ROWS = 8
"""How many rows are compared."""
TOLERANCE = 0.03
"""A few steps of bf16."""
logger = logging.getLogger(__name__)


def apply_liger(model: nn.Module) -> int:
    """Replace the forward of a model's modules by liger-kernel's, on a GPU.

    Args:
        model: a transformers model, with or without adapters in it; its modules keep their classes,
            names and weights.

    Returns:
        How many modules were replaced; 0 for an architecture that liger-kernel does not know.
    """
    forwards = {module: module.forward for module in model.modules()}
    sources = {type(module).__module__ for module in forwards}
    names = {sys.modules[name]: dict(vars(sys.modules[name])) for name in sources}
    _replace_by_liger(model)
    for source, before in names.items():
        _restore(source, before)
    count = 0
    for module, original in forwards.items():
        if module.forward != original:
            module.forward = _OnGpu(module.forward, original, type(module).__name__)
            count += 1
    return count


def _replace_by_liger(model: nn.Module) -> None:
    experts = any("Expert" in type(module).__name__ for module in model.modules())
    silu = getattr(model.config, "hidden_act", None) in ("silu", "swish")
    parts = {"rope": True, "rms_norm": True, "swiglu": silu and not experts, "geglu": False}
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    try:
        environment.function("liger")(model=model, **parts, **losses)
    except Exception as error:  # of another version of transformers; what it replaced is compared
        logger.warning(tr("liger-kernel cannot be used, or in part only: %s"), error)


def _restore(source: ModuleType, before: dict[str, Any]) -> None:
    """Restore a module of transformers; its functions keep liger-kernel's for GPU tensors."""
    for name, original in before.items():
        new = getattr(source, name, original)
        if new is original:
            continue
        done = isinstance(original, _OnGpu) or isinstance(
            getattr(original, "original", None), _OnGpu
        )
        whole = isinstance(original, type) or done
        setattr(source, name, original if whole else _OnGpu(new, original, name))


class _OnGpu:
    """Calls liger-kernel for tensors on a GPU; the original elsewhere, or if the two differ."""

    def __init__(self, liger: Callable[..., Any], original: Callable[..., Any], name: str) -> None:
        self.liger, self.original, self.name = liger, original, name
        self.checked = False

    def __call__(self, *args: object, **kwargs: object) -> Any:
        if not args or not _is_on_gpu(args[0]):
            return self.original(*args, **kwargs)
        if not self.checked:
            self.checked = True
            self._compare(args, kwargs)
        return self.liger(*args, **kwargs)

    def _compare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Use the original from now on where liger-kernel computes something else, or fails."""
        of = getattr(self.original, "__self__", None)
        if isinstance(of, nn.Module) and any(of.children()):
            return  # its layers may drop at random, and differ by that
        try:
            ours, theirs = (_few_rows(each, args, kwargs) for each in (self.liger, self.original))
            same = all(
                one.shape == other.shape
                and torch.allclose(one.float(), other.float(), rtol=TOLERANCE, atol=TOLERANCE)
                for one, other in zip(ours, theirs, strict=True)
            )
            why = "" if same else "its values differ"
        except Exception as error:  # whatever a kernel fails with, the original is there
            why = str(error) or type(error).__name__
        if why:
            logger.warning(tr("%s is computed without liger-kernel: %s."), self.name, why)
            self.liger = self.original


def _is_on_gpu(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


@torch.no_grad()
def _few_rows(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, ...]:
    """The results for the first rows (of the last but one dimension) of each tensor."""
    few = [each[..., :ROWS, :].clone() if isinstance(each, Tensor) else each for each in args]
    found = function(*few, **kwargs)
    return found if isinstance(found, tuple) else (found,)
