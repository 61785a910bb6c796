"""The state of a small run, as it is saved, and an object whose pickle runs code."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


class RunsCode:
    """Pickles as a call, as a hostile checkpoint does."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def history(*values: float) -> HistoryBuffer:
    buffer = HistoryBuffer()
    for value in values:
        buffer.update(value)
    return buffer


def state(iterations: int = 4) -> dict:
    return {
        "meta": {"iter": iterations, "epoch": 0, "seed": 1},
        "state_dict": {"llm.a": torch.arange(2000.0), "llm.b": torch.ones(3, dtype=torch.bfloat16)},
        "optimizer": {"state": {0: {"step": torch.tensor(4.0)}}, "param_groups": [{"lr": 0.1}]},
        "message_hub": {
            "log_scalars": {"train/loss": history(2.0, 1.5)},
            "runtime_info": {"best_score": np.float64(0.5)},
            "resumed_keys": {"train/loss": True, "best_score": True},
        },
    }
