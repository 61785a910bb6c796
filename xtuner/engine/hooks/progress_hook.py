"""The terminal during training: what will be done, how it goes, what to do next."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from xtuner.engine.runner.finetune_runner import FinetuneRunner

SECONDS_BETWEEN_LINES = 10.0


@HOOKS.register_module()
class ProgressHook(Hook):
    """Shows one block before the start, then progress, then the commands for the next step.

    In a terminal progress is one line that changes; in a pipe or a file it is plain lines.

    Args:
        interval: optimizer steps between two plain lines; by default one is written each time the
            work done has grown by a hundredth and ten seconds have passed.
    """

    priority = "LOWEST"

    def __init__(self, interval: int | None = None) -> None:
        self.interval = interval
        self._console = Console(highlight=False, soft_wrap=True)
        self._live: Progress | None = None
        self._task: Any = None
        self._started = self._last_line = 0.0
        self._last_step = 0
        self._first: tuple[int, float] | None = None  # the first step of this run, and its end

    def show_plan(self, runner: FinetuneRunner) -> None:
        """Show what will be trained on what, and where it goes, before any hook's work begins."""
        self._started = time.perf_counter()
        if not is_main_process():
            return
        from xtuner.reporting.summary import run_summary, write_account, write_run

        write_account(runner)
        write_run(runner)
        table = Table.grid(padding=(0, 2))
        for label, value in run_summary(runner):
            table.add_row(label, value)
            if not sys.stdout.isatty():
                print(tr("{label}: {value}", label=label, value=value), flush=True)
        if sys.stdout.isatty():
            self._console.print(Panel(table, title="xtuner train", title_align="left"))
            self._live = Progress(
                TextColumn("{task.fields[step]}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
                console=self._console,
            )
            self._live.start()
            self._task = self._live.add_task("", total=runner.max_iters, step="", text="")

    def before_train(self, runner: FinetuneRunner) -> None:
        """Say what the seconds before the first step are for; the other hooks come before."""
        if not is_main_process():
            return
        text = tr("checking the model on the first batch ...")
        if self._live is not None:
            self._live.update(self._task, completed=runner.iter, text=text)
        else:
            print(text, flush=True)

    def after_train_iter(
        self,
        runner: FinetuneRunner,
        batch_idx: int,
        data_batch: Mapping[str, Any] | None = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Show the step that is done."""
        if not outputs or not is_main_process():
            return
        loop = runner.train_loop
        step = math.ceil((loop.iter + 1) / loop.accumulative_counts)
        if self._live is not None:
            label = f"{step}/{loop.max_steps}"
            text = self._text(runner, step, outputs)
            self._live.update(self._task, completed=loop.iter + 1, step=label, text=text)
        elif self._is_time_for_a_line(step, loop.max_steps):
            text = self._text(runner, step, outputs)
            print(tr("step {step}/{max_steps}", step=step, max_steps=loop.max_steps), text)
            sys.stdout.flush()

    def after_val_epoch(
        self, runner: FinetuneRunner, metrics: dict[str, float] | None = None
    ) -> None:
        """Show the result of a validation."""
        if is_main_process() and metrics:
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self._console.print(tr("validation  {numbers}", numbers=numbers))

    def after_test_epoch(
        self, runner: FinetuneRunner, metrics: dict[str, float] | None = None
    ) -> None:
        """Show the result of a test."""
        if is_main_process() and metrics:
            for name, value in metrics.items():
                self._console.print(f"{name}  {value:.6g}" if isinstance(value, float) else value)

    def after_train(self, runner: FinetuneRunner) -> None:
        """Show how long it took and the commands for the next step."""
        self.close()
        if not is_main_process():
            return
        from xtuner.reporting.summary import next_steps

        took = _clock(time.perf_counter() - self._started)
        self._console.print(
            tr("trained in {took}: {work_dir}", took=took, work_dir=runner.work_dir)
        )
        for label, command in next_steps(runner):
            self._console.print(f"  {label}\n    {command}")

    def close(self) -> None:
        """Give the terminal back; also called when the training ends early."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _is_time_for_a_line(self, step: int, steps: int) -> bool:
        if self.interval is not None:
            due = step % self.interval == 0 or step == steps
        else:
            now = time.perf_counter()
            grown = (step - self._last_step) * 100 >= steps
            due = step in (1, steps) or (grown and now - self._last_line > SECONDS_BETWEEN_LINES)
            if due:
                self._last_line, self._last_step = now, step
        return due

    def _text(self, runner: FinetuneRunner, step: int, outputs: Mapping[str, Any]) -> str:
        speed = runner.message_hub.get_scalar("train/tokens_per_sec").mean(20)
        lr = runner.optim_wrapper.get_lr()["lr"][0]
        text = tr(
            "loss {loss:.4f}  lr {lr:.2e}  {speed:,.0f} tokens/s",
            loss=outputs["loss"],
            lr=lr,
            speed=speed,
        )
        if self._first is None:  # it took longer than the others will
            self._first = step, time.perf_counter()
            return text
        first, end = self._first
        left = (time.perf_counter() - end) / max(1, step - first)
        left *= runner.train_loop.max_steps - step
        return text + tr("  {left} left", left=_clock(left))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
