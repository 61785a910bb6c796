"""One harness for every "equals": runs of the real command, and comparing what they leave."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.helpers.forked import ROOT, run_ranks
from xtuner.checkpoint.checkpoint import find_latest, load_checkpoint
from xtuner.checkpoint.folder import is_sharded_folder
from xtuner.checkpoint.io import read_torch_file
from xtuner.checkpoint.sharded import DataReader
from xtuner.quickstart import base

TOY = Path(__file__).parent / "toy_config.py"

# What is measured with a clock, or where: it differs between two equal runs.
MEASURED = re.compile(r"time$|per_sec$|^tflops|^memory|share_of_peak")


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


def differences(first: Any, second: Any, path: str = "") -> Iterator[str]:
    """Where two nested states differ, to the bit."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.dtype != second.dtype or not torch.equal(first, second):
            yield path
    elif isinstance(first, dict) and isinstance(second, dict):
        for key in sorted({*first, *second}, key=str):
            if key not in first or key not in second:
                yield f"{path}.{key} (only in one)"
            else:
                yield from differences(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        if len(first) != len(second):
            yield f"{path} (lengths {len(first)} and {len(second)})"
        for number, (one, other) in enumerate(zip(first, second, strict=False)):
            yield from differences(one, other, f"{path}[{number}]")
    elif type(first).__name__ == type(second).__name__ and hasattr(first, "__dict__"):
        # what stands for an object of DeepSpeed; each file has a class of its own for it
        yield from differences(vars(first), vars(second), path)
    elif first != second and not (first != first and second != second):  # nan equals nan here
        yield f"{path} ({first!r} and {second!r})"


def outcome(work_dir: Path) -> dict[str, Any]:
    """What a finished run leaves that must not depend on how it got there."""
    newest = find_latest(work_dir)
    assert newest is not None, f"{work_dir} has no checkpoint"
    state = load_checkpoint(newest)
    kept = ("param_schedulers", "random_states", "data_position", "loop")
    own = ("state_dict", "optimizer")
    return {
        "name": newest.name,
        "iter": state["meta"]["iter"],
        "metrics": metrics(work_dir),
        **{key: state[key] for key in kept},
        **(tensors_in(newest) if newest.is_dir() else {key: state[key] for key in own}),
    }


def tensors_in(folder: Path) -> dict[str, Any]:
    """Weights and optimizer in a checkpoint folder of FSDP or DeepSpeed, each under its name."""
    if not is_sharded_folder(folder):
        files = sorted(folder.rglob("*.pt"))
        assert files, f"{folder} holds no weights"
        return {file.name: read_torch_file(file, mapped=False) for file in files}
    reader = DataReader(folder)
    described = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in described.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    distributed_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def metrics(work_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, less what is measured with a clock."""
    lines = (work_dir / "metrics.jsonl").read_text("utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not MEASURED.search(key)}
        for line in lines
    ]
