"""Work on numbered chunks in several processes, with the results in order and a progress bar."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from xtuner.utils.cpu import usable_cores
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 30.0
"""How often progress is told where there is no terminal to draw a bar in."""

_work: Callable[[int], Any] | None = None


def usable_processes(wanted: int) -> int:
    """So many of the wanted processes as this machine has cores for us."""
    if not hasattr(os, "fork"):
        return 1
    return max(1, min(wanted, usable_cores()))


def ordered_map(work: Callable[[int], T], count: int, processes: int) -> Iterator[T]:
    """Call ``work`` for 0, 1, ... ``count`` - 1 and give the results in this order.

    Args:
        work: any function; the processes are forked, so that it need not be pickled. What it
            returns or raises is.
        count: of the chunks.
        processes: 1 for none but this one.

    Raises:
        UserError: when a process was killed.
        Exception: the first, in order, that ``work`` raised.
    """
    global _work
    if processes <= 1 or count <= 1:
        yield from map(work, range(count))
        return
    before, _work = _work, work
    # Without this the tokenizers library warns at each fork that it was used before.
    parallelism = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("fork")
    # What the processes hold has no cycles; looking for them took a tenth of the time (gc.disable).
    try:
        with ProcessPoolExecutor(min(processes, count), context, gc.disable) as pool:
            yield from pool.map(_call, range(count))
    except BrokenProcessPool as error:
        raise UserError(
            tr("a process that prepared data was killed, most likely for want of memory."),
            hint=tr("set map_num_proc lower."),
        ) from error
    finally:
        _work = before
        del os.environ["TOKENIZERS_PARALLELISM"]
        if parallelism is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = parallelism


def _call(number: int) -> Any:
    assert _work is not None
    return _work(number)


def with_progress(results: Iterator[T], sizes: list[int], what: str) -> Iterator[T]:
    """Show how far the results are: a bar in a terminal, a line now and then elsewhere.

    Args:
        results: one for each size, in order.
        sizes: rows that each result stands for.
        what: is done, for people.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = [*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn()]
    done, total, told = 0, sum(sizes), time.monotonic()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(what, total=total)
        for size, result in zip(sizes, results, strict=True):
            yield result
            done += size
            progress.update(task, completed=done)
            if not console.is_terminal and time.monotonic() - told > SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                print(f"{what}: {done:,} / {total:,}", file=sys.stderr, flush=True)
