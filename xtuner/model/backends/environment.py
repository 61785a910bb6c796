"""What this machine and the installed libraries offer, found out once in a process."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from xtuner.model.backends.case import Libraries, LibraryFunction
from xtuner.utils.lang import tr

FUNCTIONS = {
    "flash_attn": ("flash_attn", "flash_attn_varlen_func"),
    "varlen_attn": ("torch.nn.attention.varlen", "varlen_attn"),
    "liger": ("liger_kernel.transformers", "_apply_liger_kernel_to_instance"),
    "flash_attn_3": ("flash_attn_interface", "flash_attn_varlen_func"),
    "flash_attn_4": ("flash_attn.cute", "flash_attn_varlen_func"),
    "flex_attention": ("torch.nn.attention.flex_attention", "flex_attention"),
}
"""Where each function of ``Libraries`` is."""
_CHOSEN: ContextVar[torch.device | None] = ContextVar("device", default=None)
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
    path, attribute = FUNCTIONS[name]
    module = importlib.import_module(path)
    found: Callable[..., Any] | None = getattr(module, attribute, None)
    if found is not None:
        return found
    if getattr(module, "__file__", None) is None:  # flash_attn, where flash-attn 4 alone is there
        raise ModuleNotFoundError(f"{path} is a namespace", name=path)
    raise ImportError(f"{path} has no {attribute}")


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def waits_for(device: torch.device) -> bool:
    """Whether the CPU has to wait for a device to read a value of a tensor on it."""
    return device.type == "cuda"


def training_device() -> torch.device:
    """The device that this process trains on."""
    from mmengine.device import get_device

    return _CHOSEN.get() or torch.device(get_device())


@contextlib.contextmanager
def training_on(device: torch.device) -> Iterator[None]:
    """Build models for another device than the one that this process would train on."""
    token = _CHOSEN.set(device)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


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
    _warn_once(FUNCTIONS[name][0].partition(".")[0], why)
    return LibraryFunction(why)


@functools.cache
def _warn_once(package: str, why: str) -> None:
    """Of a package that several functions are looked for in."""
    logger.warning(tr("%s is installed but cannot be used: %s"), package, why)
