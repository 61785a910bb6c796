"""What a CPU needs to train well: a fair share of its cores, and memory that is kept."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Any

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of mallopt, from glibc's malloc.h
_MOST_THRESHOLD = 32 * 2**20
"""More glibc does not take: larger tensors go back to the system, which also keeps peaks low."""
SURPLUS, PAUSE = 512 * 2**20, 15.0
"""Freed memory, in pieces between what is in use, above which it is returned to the system, if that
was not done in the last so many seconds: to get a gigabyte anew takes a third of a second."""
PRODUCTS_KNOWN = 256
"""Shapes of products for which oneDNN keeps the code that it made, a megabyte each. By itself it
keeps 1,024, and rows of other lengths make other shapes; the layers of a model share theirs."""
FINEST_STEP = 16
"""Rows of a product are padded to a multiple of the largest power of 2 in this part of them."""
_given_back = float("-inf")


def usable_cores() -> int:
    """Cores that this process may use (containers and job schedulers leave it a part)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_each(processes: int) -> int:
    """Threads for each of several processes of this machine, so that they share its cores."""
    return max(1, usable_cores() // processes)


def bound_known_products() -> None:
    """Bound what oneDNN remembers; to be called before the first product of this process."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRODUCTS_KNOWN))


def pad_to_bucket(rows: int) -> int:
    """The next number of rows that products on a CPU are given, at most a 16th larger.

    oneDNN makes code for each number of rows it meets, of each layer's shape, in milliseconds each;
    and the allocator finds no gap for tensors of ever other sizes. Packed rows differ by a few
    tokens: padded to the same number, all that was made for one serves the others.
    """
    step = 1 << max(0, (rows // FINEST_STEP).bit_length() - 1)
    return -(-rows // step) * step


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for the next ones.

    Otherwise glibc gives each larger tensor back to the system, and the system fills the next one
    with zeros, page by page: about a tenth of a training step on a CPU.

    Returns:
        Whether it does; not without glibc (musl, macOS, Windows).
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is None:
        return False
    settings = {
        _MMAP_THRESHOLD: _MOST_THRESHOLD,
        _TRIM_THRESHOLD: 2**31 - 1,
        _TOP_PAD: 2 * _MOST_THRESHOLD,
    }
    taken = [mallopt(name, value) for name, value in settings.items()]
    return all(taken)


def trim_heap(now: float) -> bool:
    """Give freed memory back to the system where much of it has gathered; for between steps.

    Tensors of ever other sizes leave gaps that the next ones do not fit into.

    Args:
        now: seconds of any steady clock.

    Returns:
        Whether it was returned.
    """
    global _given_back
    if now - _given_back < PAUSE:
        return False
    mallinfo, trim = _of_glibc("mallinfo2"), _of_glibc("malloc_trim")
    if mallinfo is None or trim is None:
        return False
    mallinfo.restype = _MallInfo
    if mallinfo().fordblks <= SURPLUS:
        return False
    _given_back = now
    return bool(trim(0))


class _MallInfo(ctypes.Structure):
    """``struct mallinfo2``: bytes in the allocator's hands; ``fordblks`` are those not in use."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


@functools.cache
def _of_glibc(name: str) -> Any:
    """A function of the C library; None where it has none of that name."""
    if sys.platform != "linux":
        return None
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except OSError:
        return None
