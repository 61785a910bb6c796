"""What the training loop costs beside forward, backward and optimizer step.

Trains a model whose forward sleeps for about 100 ms, with all hooks of a published config, and
compares the time of the run with the time spent in forward, backward and step. The house's bound is
3 % of a step.

    python benchmarks/loop_overhead.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

import torch
from mmengine.dataset import DefaultSampler
from mmengine.hooks import IterTimerHook, LoggerHook, ParamSchedulerHook
from mmengine.model import BaseModel
from mmengine.optim import CosineAnnealingLR

from xtuner.engine.optim import FinetuneOptimWrapper
from xtuner.engine.runner import FinetuneRunner, TrainLoop

STEP_SECONDS = 0.1
STEPS = 60
TOKENS = 4096
BOUND = 0.03


class Rows:
    """Rows of a constant length."""

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(TOKENS, dtype=torch.long)}


class Sleeper(BaseModel):
    """Takes 100 ms for a forward, and notes how long forward and backward took."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(256, 256))

    def num_items(self, data: dict[str, Any]) -> dict[str, int]:
        return {"tokens": int((data["labels"] != -100).sum())}

    def forward(
        self,
        data: Any,
        data_samples: Any = None,
        mode: str = "loss",
        num_items_in_batch: Any = None,
    ):
        time.sleep(STEP_SECONDS)
        return {"loss": self.weight.square().mean()}


class Stopwatch(FinetuneOptimWrapper):
    """Adds up the time of backward and of the step with its clipping."""

    spent = 0.0

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        start = time.perf_counter()
        super().backward(loss, **kwargs)
        Stopwatch.spent += time.perf_counter() - start

    def clip(self) -> torch.Tensor:
        start = time.perf_counter()
        norm = super().clip()
        Stopwatch.spent += time.perf_counter() - start
        return norm

    def step(self, **kwargs: Any) -> None:
        start = time.perf_counter()
        super().step(**kwargs)
        Stopwatch.spent += time.perf_counter() - start


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"data": {"input_ids": ids, "labels": ids}, "data_samples": None}


def main() -> int:
    """Measure, print the share, and fail above the bound."""
    forward = Sleeper.forward

    def timed(self: Sleeper, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        outputs = forward(self, *args, **kwargs)
        Stopwatch.spent += time.perf_counter() - start
        return outputs

    Sleeper.forward = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        runner = FinetuneRunner(
            model=dict(type=Sleeper),
            work_dir=folder,
            train_dataloader=dict(
                batch_size=1,
                num_workers=0,
                dataset=dict(type=Rows),
                sampler=dict(type=DefaultSampler, shuffle=True),
                collate_fn=collate,
            ),
            train_cfg=dict(type=TrainLoop, max_epochs=1),
            optim_wrapper=dict(
                type=Stopwatch,
                optimizer=dict(type=torch.optim.AdamW, lr=1e-3),
                clip_grad=dict(max_norm=1),
            ),
            param_scheduler=[dict(type=CosineAnnealingLR, by_epoch=False, end=STEPS)],
            default_hooks=dict(
                timer=dict(type=IterTimerHook),
                logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=10),
                param_scheduler=dict(type=ParamSchedulerHook),
                checkpoint=None,
            ),
        )
        lines: list[float] = []
        loop = runner.train_loop
        run_iter = loop.run_iter

        def timed_step(batches: Any) -> None:
            run_iter(batches)
            lines.append(time.perf_counter())

        loop.run_iter = timed_step
        start = time.perf_counter()
        runner.train()
        whole = lines[-1] - lines[0]
        total = time.perf_counter() - start
    spent = Stopwatch.spent * (STEPS - 1) / STEPS
    overhead = (whole - spent) / whole
    print(f"{STEPS} steps of {whole / (STEPS - 1) * 1000:.1f} ms; the run took {total:.1f} s")
    print(f"overhead of the loop: {overhead:.2%} of a step (bound: {BOUND:.0%})")
    return 0 if overhead < BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
