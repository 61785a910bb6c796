"""Proofs about runs: accumulation, two processes, resuming. Each run is the engine's own.

A run of one optimizer step of SGD with a learning rate of 1 moves each weight by its gradient.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.config.lazy import LazyObject
from torch import Tensor, nn

from xtuner.checkpoint.checkpoint import load_state_dict
from xtuner.config.values import iter_dicts
from xtuner.engine.startup import import_runner, optimizer_name
from xtuner.proving import children
from xtuner.proving.outcome import differences, outcome
from xtuner.proving.proof import Measured, Proof, Skipped, prove
from xtuner.proving.subject import INITIAL, unpacked
from xtuner.proving.training import relative_difference
from xtuner.utils.lang import tr

SGD = LazyObject("torch.optim", "SGD")
CHECKPOINT_HOOK = LazyObject("mmengine.hooks", "CheckpointHook")
Change = Callable[[Config], None]


def run_training(
    config: Path,
    work_dir: Path,
    change: Change,
    *,
    launcher: str = "none",
    resume: bool = False,
    before: Callable[[Any], None] | None = None,
) -> list[str]:
    """Train in this process, as ``xtuner train`` does after its checks.

    Args:
        config: the file.
        work_dir: of the run.
        change: changes the values of the loaded config.
        launcher: ``pytorch`` in a rank of several.
        resume: continue from the newest checkpoint of ``work_dir``.
        before: called with the runner before it trains.

    Returns:
        A line for each hook that failed.
    """
    from xtuner.checkpoint.resume import checkpoint_to_resume
    from xtuner.config.adapt.adapter import RunOptions, adapt
    from xtuner.config.load import load
    from xtuner.engine.train import build_training_runner
    from xtuner.parallel.processes import shutdown_distributed

    document = load(str(config)).editable()
    import_runner(optimizer_name(document))
    change(document.config)
    document = adapt(document, RunOptions(str(work_dir), launcher))
    work_dir.mkdir(parents=True, exist_ok=True)
    runner = build_training_runner(document.config)
    if resume:
        runner.resume_from = checkpoint_to_resume(work_dir, True)
    if before is not None:
        before(runner)
    runner.train()
    shutdown_distributed()
    return list(runner.failed_hooks)


class RunProofs:
    """Proofs that compare what runs leave.

    Args:
        config: the written config, in float32, its rows a sample.
        samples: of the training data, one to a row; an even number is taken.
        has_adapter: whether the weights in the file ``INITIAL`` are an adapter's.
    """

    def __init__(self, config: Path, samples: int, *, has_adapter: bool) -> None:
        self.config, self.has_adapter = config, has_adapter
        self.folder, self.count = config.parent, samples - samples % 2

    def one_step(self) -> list[Proof]:
        """Those about one optimizer step."""
        return [prove("accumulated", self.accumulated), prove("ranks", self.ranks)]

    def resuming(self) -> list[Proof]:
        """The one about resuming a run."""
        return [prove("resumed", self.resumed)]

    def accumulated(self) -> Measured:
        """Micro-batches of one row each against one batch of all rows."""
        one = self._step("accumulated", rows=1, counts=self.count)
        other = self._step("one_batch", rows=self.count, counts=1)
        detail = tr("{count} micro-batches of 1 row; 1 of {count}", count=self.count)
        return Measured(relative_difference(one, other), detail)

    def ranks(self) -> Measured:
        """Half of the rows on each of two processes against all on one."""
        one = self._step("one_batch", rows=self.count, counts=1)
        self._require_rows()
        work_dir = self.folder / "two_ranks"
        change = self._one_step(1, self.count // 2)
        children.call_together(
            _train_rank, 2, self.config, work_dir, change, log=self.folder / "two_ranks.log"
        )
        two = self._moved(work_dir)
        detail = tr("gloo, {count} micro-batches on each", count=self.count // 2)
        return Measured(relative_difference(two, one), detail)

    def resumed(self) -> Measured:
        """A run resumed from its middle against one that was not stopped."""
        whole, again = self.folder / "whole", self.folder / "resumed"
        children.call(
            run_training, self.config, whole, _without_hooks, log=self.folder / "whole.log"
        )
        saved = sorted(whole.glob("iter_*.pth"), key=lambda file: int(file.stem[5:]))
        if len(saved) < 2:
            raise Skipped(tr("the config saves no checkpoints while it trains."))
        middle = saved[0]
        again.mkdir()
        for file in whole.glob(f"{middle.name}*"):
            shutil.copy(file, again / file.name)
        children.call(_resume, self.config, again, log=self.folder / "resumed.log")
        one, other = outcome(whole), outcome(again)
        one["metrics"] = one["metrics"][-len(other["metrics"]) :]
        found = list(differences(one, other))
        detail = tr("weights, optimizer, schedules, random states and losses after {name}",
                    name=one["name"])  # fmt: skip
        return Measured(len(found), "; ".join(found[:3]) if found else detail)

    def _step(self, name: str, *, rows: int, counts: int) -> dict[str, Tensor]:
        """How far a step moves the weights, in a run of one process; made once."""
        self._require_rows()
        work_dir = self.folder / name
        if not work_dir.exists():
            change = self._one_step(rows, counts)
            log = self.folder / f"{name}.log"
            children.call(run_training, self.config, work_dir, change, log=log)
        return self._moved(work_dir)

    def _require_rows(self) -> None:
        if self.count < 2:
            raise Skipped(tr("there is one sample."))

    def _moved(self, work_dir: Path) -> dict[str, Tensor]:
        (checkpoint,) = work_dir.glob("iter_*.pth")
        before, after = load_state_dict(self.folder / INITIAL), load_state_dict(checkpoint)
        return {name: value.double() - before[name].double() for name, value in after.items()}

    def _one_step(self, rows: int, counts: int) -> Change:
        start = str(self.folder / INITIAL) if self.has_adapter else None
        return _OneStep(rows, counts, start)


class _OneStep:
    """Changes a config to one optimizer step of SGD over some rows; see ``run_training``."""

    def __init__(self, rows: int, counts: int, start: str | None) -> None:
        self.rows, self.counts, self.start = rows, counts, start

    def __call__(self, config: Config) -> None:
        loader = config.train_dataloader
        loader.dataset = unpacked(loader.dataset)
        loader.batch_size, loader.num_workers = self.rows, 0
        if config.model.get("lora"):
            config.model.lora.lora_dropout = 0.0
        config.optim_wrapper = {
            **{k: v for k, v in config.optim_wrapper.items() if k in ("type", "dtype")},
            "optimizer": {"type": SGD, "lr": 1.0},
            "accumulative_counts": self.counts,
        }
        config.param_scheduler = []
        config.train_cfg = {"type": config.train_cfg.type, "max_iters": self.counts}
        hook = {"type": CHECKPOINT_HOOK, "interval": self.counts, "by_epoch": False}
        config.default_hooks = {"checkpoint": {**hook, "save_optimizer": False}}
        config.load_from = self.start
        _without_validation(config)


def _without_hooks(config: Config) -> None:
    """Leave out what neither trains nor saves."""
    for _, part in iter_dicts(config.default_hooks):
        if "max_keep_ckpts" in part:
            part["max_keep_ckpts"] = -1
    _without_validation(config)


def _without_validation(config: Config) -> None:
    config.custom_hooks = []
    for key in ("val_dataloader", "val_evaluator", "val_cfg"):
        config[key] = None
    for name in ("val_begin", "val_interval", "val_by_epoch"):
        config.train_cfg.pop(name, None)


def _train_rank(config: Path, work_dir: Path, change: Change) -> list[str]:
    return run_training(config, work_dir, change, launcher="pytorch")


def _resume(config: Path, work_dir: Path) -> list[str]:
    return run_training(config, work_dir, _without_hooks, resume=True)


def save_initial(model: nn.Module, folder: Path) -> None:
    """Write the trained weights of a model as a checkpoint."""
    torch.save({"state_dict": model.state_dict()}, folder / INITIAL)
