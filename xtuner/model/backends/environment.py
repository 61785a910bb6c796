"""What this machine and the installed libraries offer, found out once in a process."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

from xtuner.model.backends.case import Libraries, LibraryFunction

FUNCTIONS = {
    "flash_attn": ("flash_attn", "flash_attn_varlen_func"),
    "varlen_attn": ("torch.nn.attention.varlen", "varlen_attn"),
    "liger": ("liger_kernel.transformers", "_apply_liger_kernel_to_instance"),
}
"""Where each function of ``Libraries`` is."""
logger = logging.getLogger(__name__)


@functools.cache
def libraries() -> Libraries:
    """What the installed libraries offer on a GPU; nothing is imported without one."""
    if not torch.cuda.is_available():
        return Libraries()
    return Libraries(**{name: _found(name) for name in FUNCTIONS})


@functools.cache
def function(name: str) -> Callable[..., Any]:
    """A function of ``Libraries`` itself.

    Raises:
        ImportError: when it cannot be called.
    """
    module, attribute = FUNCTIONS[name]
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        # flash-attn 4 installs only a namespace package of the name
        raise ImportError(f"{module} has no {attribute}") from error
    return found


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def training_device() -> torch.device:
    """The device that this process trains on."""
    from mmengine.device import get_device

    return torch.device(get_device())


def _found(name: str) -> LibraryFunction:
    try:
        keywords = inspect.signature(function(name)).parameters
    except ModuleNotFoundError as error:
        wanted = FUNCTIONS[name][0]
        if error.name is not None and f"{wanted}.".startswith(f"{error.name}."):
            return LibraryFunction("not installed")
        return _broken(name, error)
    except Exception as error:  # of a build for another torch: ImportError, OSError, RuntimeError
        return _broken(name, error)
    return LibraryFunction("", frozenset(keywords))


def _broken(name: str, error: Exception) -> LibraryFunction:
    why = (str(error) or type(error).__name__).splitlines()[0]
    logger.warning("%s is installed but cannot be used: %s", FUNCTIONS[name][0], why)
    return LibraryFunction(why)
