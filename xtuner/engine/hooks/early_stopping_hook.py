"""Ending a training that no longer gets better: mmengine's hook, which here survives a restart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmengine.dist import is_main_process
from mmengine.hooks import EarlyStoppingHook as MMEngineEarlyStoppingHook
from mmengine.registry import HOOKS

from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from xtuner.engine.runner.finetune_runner import FinetuneRunner


@HOOKS.register_module(name="XTunerEarlyStoppingHook")
class EarlyStoppingHook(MMEngineEarlyStoppingHook):
    """mmengine's EarlyStoppingHook by all its keywords, with two differences.

    * The best value and how long ago it was are in every checkpoint, so that a resumed run stops
      where an undisturbed one does.
    * That it stops the run is said on the terminal.
    """

    priority = "LOW"  # judges before CheckpointHook writes down what it found

    def before_save_checkpoint(self, runner: FinetuneRunner, checkpoint: dict[str, Any]) -> None:
        """Put what this hook remembers into the checkpoint."""
        remembered = {"best_score": self.best_score, "wait_count": self.wait_count}
        checkpoint.setdefault("early_stopping", {})[self.monitor] = remembered

    def after_load_checkpoint(self, runner: FinetuneRunner, checkpoint: dict[str, Any]) -> None:
        """Take it from there; a run that had already waited long enough ends at once."""
        remembered = checkpoint.get("early_stopping", {}).get(self.monitor)
        if remembered is not None:
            self.best_score = remembered["best_score"]
            self.wait_count = remembered["wait_count"]
            runner.train_loop.stop_training = self.wait_count >= self.patience

    def after_val_epoch(self, runner: FinetuneRunner, metrics: dict[str, float]) -> None:
        """Judge a validation."""
        before = runner.train_loop.stop_training
        super().after_val_epoch(runner, metrics)
        if runner.train_loop.stop_training and not before and is_main_process():
            print(
                tr(
                    "stopping early: {monitor} is {value:.4g} after "
                    "iteration {iter}, the best was {best_score:.4g}.",
                    monitor=self.monitor,
                    value=metrics[self.monitor],
                    iter=runner.iter,
                    best_score=self.best_score,
                )
            )
