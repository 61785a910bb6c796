"""What a run leaves, and where two of them differ to the bit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from xtuner.checkpoint.checkpoint import find_latest, load_checkpoint
from xtuner.checkpoint.folder import is_sharded_folder
from xtuner.checkpoint.io import read_torch_file
from xtuner.checkpoint.sharded import DataReader
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

# What is measured with a clock, or where: it differs between two equal runs.
MEASURED = re.compile(r"time$|per_sec$|^tflops|^memory|share_of_peak")


def differences(first: object, second: object, path: str = "") -> Iterator[str]:
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
    """What a finished run leaves that must not depend on how it got there.

    Raises:
        UserError: when it left no checkpoint.
    """
    newest = find_latest(work_dir)
    if newest is None:
        raise UserError(tr("the run left no checkpoint."), where=Where(str(work_dir)))
    state = load_checkpoint(newest)
    kept = ("param_schedulers", "random_states", "data_position", "loop")
    own = ("state_dict", "optimizer")
    return {
        "name": newest.name,
        "iter": state["meta"]["iter"],
        "metrics": metrics(work_dir),
        **{key: state[key] for key in kept if key in state},
        **(tensors_in(newest) if newest.is_dir() else {k: state[k] for k in own if k in state}),
    }


def tensors_in(folder: Path) -> dict[str, Any]:
    """Weights and optimizer in a checkpoint folder of FSDP or DeepSpeed, each under its name."""
    if not is_sharded_folder(folder):
        files = sorted(folder.rglob("*.pt"))
        if not files:
            raise UserError(tr("this folder holds no weights."), where=Where(str(folder)))
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
