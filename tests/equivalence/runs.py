"""One harness for every "equals": runs of the real command; ``proving.outcome`` compares them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers.forked import ROOT, run_ranks
from xtuner.quickstart import base

TOY = Path(__file__).parent / "toy_config.py"


def make_small_base(folder: Path) -> None:
    """The base model of the quickstart, smaller, where a run in the folder looks for it."""
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "SIZES", base.SIZES | sizes)
        base.make_base(folder / "work_dirs" / "quickstart_base")


def train(config: str | Path, work_dir: Path, *words: str) -> tuple[int, str]:
    """Run ``xtuner train`` in this process. Returns the exit status and all that was printed."""
    from xtuner.entry_point import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = main(["train", str(config), "--work-dir", str(work_dir), *words])
    return status, printed.getvalue()


def start(
    config: str | Path, work_dir: Path, *words: str, processes: int, log: Path | None = None
) -> subprocess.Popen[str]:
    """Start ``xtuner train`` as a process group of its own, its output to a pipe or a file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["NPROC_PER_NODE"] = str(processes)
    return subprocess.Popen(
        [sys.executable, "-m", "xtuner", "train", str(config), "--work-dir", str(work_dir), *words],
        env=environment,
        stdout=log.open("a") if log else subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def train_on_ranks(
    size: int, runs: Sequence[Sequence[str | Path]], folder: Path, cwd: Path = ROOT
) -> list[str]:
    """Run ``xtuner train`` several times, each run on all ranks of one gloo group.

    Runs with ZeRO-3 come last: a process keeps it in mind.

    Args:
        size: number of processes; they are forked, so that imports cost once.
        runs: the words of each run, in order.
        folder: for the list of the runs.
        cwd: the folder in which they run.

    Returns:
        What each rank printed.
    """
    file = folder / "runs.json"
    file.write_text(json.dumps([[str(word) for word in words] for words in runs]), "utf-8")
    ranks = run_ranks(size, "-m", "tests.equivalence.train_worker", file, folder=cwd)
    return [rank.stdout + rank.stderr for rank in ranks]
