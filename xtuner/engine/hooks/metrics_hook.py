"""Keeps what is measured: ``metrics.jsonl``, one line an optimizer step, and a picture of it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import IO, Any

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

FILE = "metrics.jsonl"
PICTURE = "curves.png"


@HOOKS.register_module()
class MetricsHook(Hook):
    """Writes ``work_dir/metrics.jsonl`` and, at the end, ``work_dir/curves.png``.

    A training line has ``iter`` (micro-batches done), ``step`` (optimizer steps done), ``epoch``
    (with its fraction), ``lr``, ``time`` (seconds this step took), ``tokens_per_sec`` and all that
    the loop reports (``loss``, ``grad_norm``, ``tokens``, ...). A validation line has ``iter`` and
    the metrics as ``val/<name>``. Resuming cuts the file back to the checkpoint.
    """

    priority = "NORMAL"

    def __init__(self) -> None:
        self._stream: IO[str] | None = None
        self._since = 0.0

    def before_train(self, runner: Any) -> None:
        """Open the file and start the clock."""
        self._open(runner)
        self._since = time.perf_counter()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Write the line of an optimizer step, at its last micro-batch."""
        loop = runner.train_loop
        if not outputs or not loop.step_finished:
            return
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        done = loop.iter + 1
        line = {
            "iter": done,
            "step": math.ceil(done / loop.accumulative_counts),
            "epoch": round(done / loop.epoch_length, 4) if loop.epoch_length else 0,
            "lr": runner.optim_wrapper.get_lr()["lr"][0],
            "time": round(seconds, 4),
            "tokens_per_sec": round(outputs.get("tokens", 0) / seconds, 1),
            **outputs,
        }
        runner.message_hub.update_scalar("train/tokens_per_sec", line["tokens_per_sec"])
        self._write(line)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Write the line of a validation; its time does not count as training."""
        if self._stream is not None:
            numbers = {f"val/{name}": value for name, value in (metrics or {}).items()}
            self._write({"iter": runner.train_loop.iter, **numbers})
        self._since = time.perf_counter()

    def after_train(self, runner: Any) -> None:
        """Close the file and draw it."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            from xtuner.engine.curves import draw, read_run

            folder = Path(runner.work_dir)
            draw([read_run(folder)], folder / PICTURE, names=("loss", "lr"))

    @master_only
    def _open(self, runner: Any) -> None:
        path = Path(runner.work_dir) / FILE
        if runner.train_loop.iter == 0:
            path.unlink(missing_ok=True)
        self._stream = path.open("a", encoding="utf-8", buffering=1)

    def _write(self, line: dict[str, Any]) -> None:
        if self._stream is not None:
            self._stream.write(json.dumps(line) + "\n")
