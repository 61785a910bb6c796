"""Settings of a process that trains on a GPU."""

from __future__ import annotations

import os

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""What torch reads its allocator's settings from, since 2.9 and before."""


def use_expandable_segments() -> None:
    """Let torch grow its segments of a GPU's memory, unless the environment has other settings.

    Micro-batches differ in length: in segments of fixed size, memory that earlier ones left free
    fits no later one. To be called before a process first uses a GPU's memory.
    """
    import torch
    from packaging.version import Version

    if any(name in os.environ for name in ALLOCATOR_VARIABLES):
        return
    new, old = ALLOCATOR_VARIABLES
    name = new if Version(torch.__version__) >= Version("2.9") else old
    os.environ[name] = "expandable_segments:True"
