"""A few real optimizer steps of a config on this machine: what they need, and how fast they are."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from xtuner.config.document import ConfigDocument
from xtuner.config.values import raw_dict
from xtuner.planning.plan import Measured
from xtuner.proving import children

STEPS = 3
"""Optimizer steps; the first one, which compiles and allocates, does not count for the speed."""


def calibrate(document: ConfigDocument, folder: Path) -> Measured:
    """Train a few steps in a process of their own, with the config's model, rows and lengths.

    Args:
        document: a checked config, overrides applied.
        folder: for what the steps write.

    Raises:
        UserError: that the training ended with.
    """
    config = _write(document, folder)
    log = folder / "calibrate.log"
    found: Measured = children.call(_measure, config, folder / "run", log=log)
    return found


def in_one_process(document: ConfigDocument) -> ConfigDocument:
    """The config for one process, which shares its rows with no other."""
    document = document.editable()
    values = raw_dict(document.config)
    if "sequence_parallel_size" in values:
        values["sequence_parallel_size"] = 1
    return document


def _write(document: ConfigDocument, folder: Path) -> Path:
    """The config with few steps, without hooks, validation and checkpoints."""
    from xtuner.config.dump import write_config

    document = in_one_process(document)
    values = raw_dict(document.config)
    wrapper = dict.get(values, "optim_wrapper") or {}
    counts = int(dict.get(wrapper, "accumulative_counts") or 1)
    loop = {key: value for key, value in values["train_cfg"].items() if key != "max_epochs"}
    values["train_cfg"] = {**loop, "max_iters": STEPS * counts}
    for key in ("val_dataloader", "val_cfg", "val_evaluator", "custom_hooks", "visualizer"):
        values.pop(key, None)
    hooks = dict(dict.get(values, "default_hooks") or {})
    values["default_hooks"] = {**hooks, "checkpoint": None}
    values |= {"resume": False, "before_run": None}
    path = folder / "calibrate.py"
    write_config(document, path)
    return path


def _measure(config: Path, work_dir: Path) -> Measured:
    """Train, and read what was measured; in the child."""
    import torch

    from xtuner.engine.train import train

    train(str(config), work_dir=str(work_dir))
    lines = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_time" in line]
    steps = steps[1:] or steps
    counts = steps[-1]["iter"] / steps[-1]["step"]
    on_gpu = torch.cuda.is_available()
    return Measured(
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        memory=torch.cuda.max_memory_allocated() if on_gpu else None,
        batch_seconds=statistics.median(line["step_time"] for line in steps) / counts,
        tokens_per_second=statistics.median(line["tokens_per_sec"] for line in steps),
    )
