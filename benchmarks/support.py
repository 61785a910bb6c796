"""Which architectures of transformers train right: all of them, as tiny random models.

    python benchmarks/support.py             # those that the result does not have yet
    python benchmarks/support.py --again     # all
    python benchmarks/support.py llama lfm2  # these, again

Each architecture is tried in a process that is forked for it, with a limit of time and memory, so
that none ends the others. What was found is kept after each one: a run that was stopped goes on.
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
from collections.abc import Iterable
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULT = ROOT / "benchmarks" / "results" / "support.json"
LIBRARIES = ("transformers", "torch", "peft", "bitsandbytes")
SECONDS = 240
"""An architecture's limit of time."""
BYTES = 8 * 2**30
"""Its limit of memory beside what this process has."""

Architecture = tuple[str, bool]
"""A ``model_type``, and whether the class for images and text is taken."""


def architectures() -> list[Architecture]:
    """All causal architectures, and those for images and text."""
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    images = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return [
        (kind, causal.get(kind, images.get(kind)) == images.get(kind)) for kind in causal | images
    ]


class Trial:
    """An architecture that is tried in a process of its own.

    Args:
        kind: a ``model_type`` of transformers.
        images: take the class for images and text.
        columns: those to try; all of them when None.
    """

    def __init__(self, kind: str, images: bool, columns: Iterable[str] | None = None) -> None:
        from tests.helpers.support import COLUMNS

        self.kind, self.images = kind, images
        self.columns = list(COLUMNS if columns is None else columns)
        self.folder = tempfile.TemporaryDirectory()
        self.file = Path(self.folder.name) / "cells.jsonl"
        self.start = time.monotonic()
        # Forked from the main thread: what it forks itself would die with another one.
        context = multiprocessing.get_context("fork")
        arguments = (kind, images, self.columns, self.file)
        self.process = context.Process(target=_try_columns, args=arguments)
        self.process.start()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start

    def end(self) -> dict[str, Any]:
        """Wait for the process, to its limit of time.

        Returns:
            ``{"images": ..., "seconds": ..., "cells": {column: [state, reason]}}``.
        """
        self.process.join(max(0.0, SECONDS - self.seconds))
        ending = "the process was ended"
        if self.process.is_alive():
            ending = f"not done after {SECONDS} s"
            os.killpg(self.process.pid, signal.SIGKILL)  # with what it forked
        self.process.join()
        lines = self.file.read_text("utf-8").splitlines() if self.file.is_file() else []
        self.folder.cleanup()
        cells = dict(json.loads(line) for line in lines)
        for name in self.columns:
            if name not in cells:
                cells[name], ending = ["fails", ending], "not reached"
        return {"images": self.images, "seconds": round(self.seconds, 1), "cells": cells}


def _try_columns(kind: str, images: bool, columns: list[str], file: Path) -> None:
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
    with support.tiny(kind, images=images) as architecture, file.open("a", encoding="utf-8") as out:
        for name in columns:
            cell = support.try_column(support.COLUMNS[name], architecture)
            out.write(json.dumps([name, list(asdict(cell).values())]) + "\n")
            out.flush()


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


def run(wanted: list[Architecture], columns: list[str] | None, jobs: int) -> None:
    """Try architectures, some of them at the same time, and keep what was found after each."""
    from tests.helpers.support import COLUMNS  # imported once, before the processes are forked

    result = read()
    waiting, running = wanted[::-1], list[Trial]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(Trial(*waiting.pop(), columns))
        ends = [trial.process.sentinel for trial in running]
        left = SECONDS - max(trial.seconds for trial in running)
        ended = multiprocessing.connection.wait(ends, max(0.0, left))
        for trial in list(running):
            if trial.process.sentinel in ended or trial.seconds > SECONDS:
                running.remove(trial)
                found = trial.end()
                known = result["architectures"].get(trial.kind, {"cells": {}})
                cells = {**known["cells"], **found["cells"]}
                found["cells"] = {name: cells[name] for name in COLUMNS if name in cells}
                result["architectures"][trial.kind] = found
                write(result)
                cells = {name: cell[0] for name, cell in found["cells"].items()}
                print(trial.kind, found["seconds"], cells, flush=True)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", help="architectures to try again (default: new ones)")
    parser.add_argument("--again", action="store_true", help="try all of them again")
    parser.add_argument("--columns", nargs="+", help="try these alone, and keep the others")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    args = parser.parse_args()
    known = set() if args.again else read()["architectures"].keys()
    wanted = [one for one in architectures() if one[0] in args.kinds or not args.kinds]
    wanted = [one for one in wanted if args.kinds or one[0] not in known]
    run(wanted, args.columns, args.jobs)


if __name__ == "__main__":
    main()
