"""What a CPU needs to train well: a fair share of its cores, and memory that is kept."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of mallopt, from glibc's malloc.h
_MOST_THRESHOLD = 32 * 2**20
"""More glibc does not take: larger tensors go back to the system, which also keeps peaks low."""


def usable_cores() -> int:
    """Cores that this process may use (containers and job schedulers leave it a part)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_each(processes: int) -> int:
    """Threads for each of several processes of this machine, so that they share its cores."""
    return max(1, usable_cores() // processes)


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for the next ones.

    Otherwise glibc gives each larger tensor back to the system, and the system fills the next one
    with zeros, page by page: about a tenth of a training step on a CPU.

    Returns:
        Whether it does; not without glibc (musl, macOS, Windows).
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {
        _MMAP_THRESHOLD: _MOST_THRESHOLD,
        _TRIM_THRESHOLD: 2**31 - 1,
        _TOP_PAD: 2 * _MOST_THRESHOLD,
    }
    taken = [mallopt(name, value) for name, value in settings.items()]
    return all(taken)
