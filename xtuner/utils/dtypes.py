"""Floating-point dtypes by name: as configs, command lines and torch write them.

Importing this needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHORT_NAMES: Mapping[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""The short names of command lines, and torch's."""
DTYPE_NAMES = ("float16", "bfloat16", "float32", "float64")
"""The dtypes that a model can be loaded in, by torch's names."""
_ALIASES = {**SHORT_NAMES, "half": "float16", "float": "float32", "double": "float64"}


def dtype_name(dtype: object) -> str:
    """The name that torch has for a dtype.

    Args:
        dtype: a ``torch.dtype``, or a name: ``float16``, ``torch.float16``, ``fp16``, ``half``.

    Returns:
        For example ``float16``; other text as it is.
    """
    name = str(dtype).removeprefix("torch.")
    return _ALIASES.get(name, name)


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name, see ``dtype_name``.

    Raises:
        ValueError: when it is no floating-point dtype.
    """
    import torch

    if dtype_name(name) not in DTYPE_NAMES:
        raise ValueError(f"{name!r} is no dtype; there are {', '.join(DTYPE_NAMES)}")
    dtype: torch.dtype = getattr(torch, dtype_name(name))
    return dtype


def gpu_has_bf16() -> bool:
    """Whether the GPU computes in bfloat16 itself; torch emulates it on older ones, slowly."""
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)
