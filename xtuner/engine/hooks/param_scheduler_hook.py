"""Schedules that advance once an optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmengine.hooks import ParamSchedulerHook as MMEngineParamSchedulerHook
from mmengine.registry import HOOKS

if TYPE_CHECKING:
    from xtuner.engine.runner.finetune_runner import FinetuneRunner


@HOOKS.register_module(name="XTunerParamSchedulerHook")
class ParamSchedulerHook(MMEngineParamSchedulerHook):
    """mmengine's hook, which advances schedules at the end of an optimizer step.

    A schedule by epoch waits for the end of the step in which the epoch ends, so that all
    micro-batches of a step have one learning rate.
    """

    def __init__(self) -> None:
        super().__init__()
        self._epochs_ended = 0

    def after_train_iter(
        self,
        runner: FinetuneRunner,
        batch_idx: int,
        data_batch: Mapping[str, Any] | None = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Advance the schedules by step, and those by epoch for epochs that ended within it."""
        if not runner.train_loop.step_finished:
            return
        super().after_train_iter(runner, batch_idx)
        for _ in range(self._epochs_ended):
            super().after_train_epoch(runner)
        self._epochs_ended = 0

    def after_train_epoch(self, runner: FinetuneRunner) -> None:
        """Advance the schedules by epoch, now or at the end of the step."""
        if runner.train_loop.step_finished:
            super().after_train_epoch(runner)
        else:
            self._epochs_ended += 1
