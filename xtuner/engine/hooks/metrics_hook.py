"""Keeps what is measured: ``metrics.jsonl``, one line an optimizer step, and a picture of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

if TYPE_CHECKING:
    from xtuner.engine.runner.finetune_runner import FinetuneRunner

FILE = "metrics.jsonl"
PICTURE = "curves.png"


@HOOKS.register_module()
class MetricsHook(Hook):
    """Writes ``work_dir/metrics.jsonl`` and, at the end, ``work_dir/curves.png``.

    A training line has ``iter`` (micro-batches done), ``step`` (optimizer steps done), ``epoch``
    (with its fraction), ``lr``, ``tokens_per_sec`` and all that the loop reports (``loss``,
    ``grad_norm``, ``tokens``, ``step_time`` in seconds, ...). A validation line has ``iter`` and
    the metrics as ``val/<name>``. Resuming cuts the file back to the checkpoint.
    """

    priority = "NORMAL"

    def __init__(self) -> None:
        self._stream: IO[str] | None = None

    def before_train(self, runner: FinetuneRunner) -> None:
        """Open the file."""
        self._open(runner)

    def after_train_iter(
        self,
        runner: FinetuneRunner,
        batch_idx: int,
        data_batch: Mapping[str, Any] | None = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the line of an optimizer step, at its last micro-batch."""
        loop = runner.train_loop
        if not outputs or not loop.step_finished:
            return
        done = loop.iter + 1
        line = {
            "iter": done,
            "step": math.ceil(done / loop.accumulative_counts),
            "epoch": round(done / loop.epoch_length, 4) if loop.epoch_length else 0,
            "lr": runner.optim_wrapper.get_lr()["lr"][0],
            "tokens_per_sec": round(outputs["tokens"] / outputs["step_time"], 1),
            **outputs,
        }
        runner.message_hub.update_scalar("train/tokens_per_sec", line["tokens_per_sec"])
        self._write(line)

    def after_val_epoch(
        self, runner: FinetuneRunner, metrics: dict[str, float] | None = None
    ) -> None:
        """Write the line of a validation."""
        if self._stream is not None:
            numbers = {f"val/{name}": value for name, value in (metrics or {}).items()}
            self._write({"iter": runner.train_loop.iter, **numbers})

    def after_train(self, runner: FinetuneRunner) -> None:
        """Close the file and draw it."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            from xtuner.reporting.curves import draw, read_run

            folder = Path(runner.work_dir)
            draw([read_run(folder)], folder / PICTURE, names=("loss", "lr"))

    @master_only
    def _open(self, runner: FinetuneRunner) -> None:
        path = Path(runner.work_dir) / FILE
        if runner.train_loop.iter == 0:
            path.unlink(missing_ok=True)
        self._stream = path.open("a", encoding="utf-8", buffering=1)

    def _write(self, line: dict[str, Any]) -> None:
        if self._stream is not None:
            self._stream.write(json.dumps(line) + "\n")
