"""What a CPU needs to train well: a fair share of its cores, and memory that is kept."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of mallopt, from glibc's malloc.h
_MOST_THRESHOLD = 32 * 2**20
"""More glibc does not take: larger tensors go back to the system, which also keeps peaks low."""
SURPLUS, PAUSE = 512 * 2**20, 15.0
"""By how much a process grows before its heap is trimmed, if that was not done in the last so many
seconds: to get a gigabyte anew takes a third of a second."""
BUSY = 0.5
"""Processes that ran in the last minute for each core of the machine, from which it is busy."""
SETTLING = 8
"""Steps after a trim whose most memory counts as what steps need."""
PRODUCTS_KNOWN = 256
"""Shapes of products for which oneDNN keeps the code that it made, a megabyte each. By itself it
keeps 1,024, and rows of other lengths make other shapes; the layers of a model share theirs."""
FINEST_STEP = 16
"""Rows of a product are padded to a multiple of the largest power of 2 in this part of them."""


def usable_cores() -> int:
    """Cores that this process may use (containers and job schedulers leave it a part)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_each(processes: int) -> int:
    """Threads for each of several processes of this machine, so that they share its cores."""
    return max(1, usable_cores() // processes)


def sleep_on_busy_machines() -> bool:
    """Let threads sleep where they wait for others, if this machine has other work.

    libgomp's run in a loop instead, at the end of each operation. That is 5 to 10 % quicker where
    each has a core (a step of 34M parameters), but where other processes run it keeps from the
    cores what they wait for: beside tests on both cores the same step takes three times as long.
    To be called before torch is imported; ``OMP_WAIT_POLICY`` and ``GOMP_SPINCOUNT`` of the
    environment are left as they are.

    Returns:
        Whether they will.
    """
    if not hasattr(os, "getloadavg") or {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        return False
    busy = os.getloadavg()[0] > BUSY * (os.cpu_count() or 1)
    if busy:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    return busy


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


class HeapTrimmer:
    """Gives memory back to the system that steps leave behind, and keeps what they use again.

    Tensors of ever other sizes leave gaps that the next ones do not fit into, and the process
    grows. But what a step frees at its end (activations, gradients) the next one needs, and what it
    holds then is no measure of that: so a process is trimmed only when it has grown since it was
    trimmed last.
    """

    def __init__(self) -> None:
        self._settled = 0
        self._steps = SETTLING
        self._trimmed_at = float("-inf")

    def after_step(self, now: float) -> bool:
        """Trim the heap if that is due; the first time after the first step, for what loading left.

        Args:
            now: seconds of any steady clock.

        Returns:
            Whether memory was returned.
        """
        held = _resident_bytes()
        if self._steps < SETTLING:
            self._steps += 1
            self._settled = max(self._settled, held)
            return False
        if held <= self._settled + SURPLUS or now - self._trimmed_at < PAUSE:
            return False
        trim = _of_glibc("malloc_trim")
        self._steps, self._settled, self._trimmed_at = 0, 0, now
        return bool(trim and trim(0))


def _resident_bytes() -> int:
    """The memory of this process; 0 where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text("ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@functools.cache
def _of_glibc(name: str) -> Any:
    """A function of the C library; None where it has none of that name."""
    if sys.platform != "linux":
        return None
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except OSError:
        return None
