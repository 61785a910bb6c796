"""Which architectures of transformers train right: all of them, as tiny random models.

    python benchmarks/support.py             # what the result does not have yet
    python benchmarks/support.py --again     # all; goes on without --again when it was stopped
    python benchmarks/support.py llama lfm2  # these, again

Each architecture is tried in a process that is forked for it, with a limit of memory, and of time
for each column, so that none ends the others. What was found is kept after each one.
The columns are those of ``tests/helpers/support.py``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULT = ROOT / "benchmarks" / "results" / "support.json"
OF_IMAGES = "(images)"
"""Marks the second class of a kind."""
LIBRARIES = ("transformers", "torch", "peft", "bitsandbytes")
SECONDS = 240
"""A column's limit of processor time."""
WALL = 10 * SECONDS
"""An architecture's limit of time on the clock, where a process waits for nothing."""
BYTES = 8 * 2**30
"""Its limit of memory beside what this process has."""


class Architecture(NamedTuple):
    """What is tried.

    Attributes:
        name: in the result.
        kind: a ``model_type`` of transformers.
        images: whether the class for images and text is taken.
    """

    name: str
    kind: str
    images: bool


def architectures() -> list[Architecture]:
    """All causal architectures, and those for images and text; some kinds have two classes."""
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    images = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    shared = {kind for kind in causal if causal[kind] == images.get(kind)}
    found = [Architecture(kind, kind, kind in shared) for kind in causal]
    for kind in images:
        if kind not in shared:
            found.append(
                Architecture(f"{kind} {OF_IMAGES}" if kind in causal else kind, kind, True)
            )
    return found


class Trial:
    """An architecture that is tried in a process of its own.

    Args:
        architecture: what is tried.
        columns: those to try.
    """

    def __init__(self, architecture: Architecture, columns: Sequence[str]) -> None:
        self.architecture, self.columns = architecture, list(columns)
        self.folder = tempfile.TemporaryDirectory()
        self.file = Path(self.folder.name) / "cells.jsonl"
        self.start = time.monotonic()
        # Forked from the main thread: what it forks itself would die with another one.
        context = multiprocessing.get_context("fork")
        arguments = (architecture, self.columns, self.file)
        self.process = context.Process(target=_try_columns, args=arguments)
        self.process.start()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start

    def end(self) -> dict[str, Any]:
        """Wait for the process, to its limit of time.

        Returns:
            ``{column: [state, reason]}``, to the column that ended the process.
        """
        self.process.join(max(0.0, WALL - self.seconds))
        ending = "the process was ended"
        if self.process.is_alive():
            ending = f"not done after {WALL} s"
            os.killpg(self.process.pid, signal.SIGKILL)  # with what it forked
        self.process.join()
        lines = self.file.read_text("utf-8").splitlines() if self.file.is_file() else []
        self.folder.cleanup()
        cells = dict(json.loads(line) for line in lines)
        if len(cells) < len(self.columns):
            cells[self.columns[len(cells)]] = ["fails", ending]
        return cells


def _try_columns(architecture: Architecture, columns: list[str], file: Path) -> None:
    """Write each column's cell as it is found."""
    import torch
    import transformers

    from tests.helpers import support

    os.setsid()
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1), os.dup2(nothing, 2)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGPROF, _end_column)
    kind, images = architecture.kind, architecture.images
    with support.tiny(kind, images=images) as tiny, file.open("a", encoding="utf-8") as out:
        for name in columns:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            cell = support.try_column(support.COLUMNS[name], tiny)
            signal.setitimer(signal.ITIMER_PROF, 0)
            out.write(json.dumps([name, list(asdict(cell).values())]) + "\n")
            out.flush()


def _end_column(number: int, frame: object) -> None:
    raise TimeoutError(f"not done after {SECONDS} s of processor time")


def versions() -> dict[str, str]:
    """Those of the libraries that what is found depends on."""
    return {name: version(name) for name in LIBRARIES}


def read() -> dict[str, Any]:
    """The committed result; empty where there is none."""
    if not RESULT.is_file():
        return {"versions": versions(), "architectures": {}}
    found: dict[str, Any] = json.loads(RESULT.read_text("utf-8"))
    return found


def write(result: dict[str, Any]) -> None:
    """Keep a result, its architectures in alphabetical order."""
    kept = dict(sorted(result["architectures"].items()))
    whole = {"date": date.today().isoformat(), "versions": versions(), "architectures": kept}
    RESULT.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")


def run(wanted: Sequence[tuple[Architecture, Sequence[str]]], jobs: int) -> None:
    """Try architectures, some of them at the same time, and keep what was found after each.

    Args:
        wanted: architectures and their columns.
        jobs: how many at the same time.
    """
    from tests.helpers.support import COLUMNS  # imported once, before the processes are forked

    result = read()
    waiting, running = list(wanted)[::-1], list[Trial]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(Trial(*waiting.pop()))
        ends = [trial.process.sentinel for trial in running]
        left = WALL - max(trial.seconds for trial in running)
        ended = multiprocessing.connection.wait(ends, max(0.0, left))
        for trial in list(running):
            if trial.process.sentinel not in ended and trial.seconds <= WALL:
                continue
            running.remove(trial)
            cells = trial.end()
            left_out = [name for name in trial.columns if name not in cells]
            if left_out:
                waiting.append((trial.architecture, left_out))
            name, kind, images = trial.architecture
            known = result["architectures"].get(name, {"cells": {}})["cells"] | cells
            kept = {column: known[column] for column in COLUMNS if column in known}
            result["architectures"][name] = {"kind": kind, "images": images, "cells": kept}
            write(result)
            states = {column: cell[0] for column, cell in cells.items()}
            print(name, round(trial.seconds, 1), states, flush=True)


def main() -> None:
    """See the module's docstring."""
    from tests.helpers.support import COLUMNS

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="architectures to try again (default: all)")
    parser.add_argument("--again", action="store_true", help="forget what was found")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    args = parser.parse_args()
    result, wanted = read(), []
    if args.again:
        write({"architectures": {}})
        result = read()
    for one in architectures():
        known = result["architectures"].get(one.name, {"cells": {}})["cells"]
        again = one.name in args.names
        columns = [name for name in args.columns if again or name not in known]
        if not one.images:
            columns = [name for name in columns if not name.startswith("images_")]
        if columns and (again or not args.names):
            wanted.append((one, columns))
    run(wanted, args.jobs)


if __name__ == "__main__":
    main()
