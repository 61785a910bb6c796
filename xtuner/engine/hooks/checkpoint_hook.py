"""When checkpoints are written and which are kept: mmengine's CheckpointHook, made hard to kill."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.dist import barrier, is_main_process
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.registry import HOOKS

from xtuner.checkpoint.checkpoint import remove, remove_leftovers
from xtuner.checkpoint.resume import resume_command
from xtuner.engine.stop import SAVE, Stop, exit_status, told
from xtuner.utils.errors import RunStopped
from xtuner.utils.files import write_text
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from xtuner.engine.runner.finetune_runner import FinetuneRunner


@HOOKS.register_module(name="XTunerCheckpointHook")
class CheckpointHook(MMEngineCheckpointHook):
    """mmengine's CheckpointHook by all its keywords, with four differences.

    * A checkpoint is written at the end of an optimizer step, never within one, and after the
      validation that is due at the same iteration.
    * An old one is deleted only after the new one is written and checked.
    * On SIGTERM, SIGINT, SIGHUP, or ``save_before`` seconds before a Slurm job's end, one is
      written at the end of the step and the run ends with the command that resumes it. On SIGUSR1
      one is written and the run continues.
    * Its files have manifests, which are deleted with them.

    Args:
        save_before: seconds before the time limit of the Slurm job; None for no heed of it.
        keywords: those of mmengine's CheckpointHook.
    """

    out_dir: Any

    def __init__(self, *, save_before: float | None = None, **keywords: Any) -> None:
        super().__init__(**keywords)
        self._stop = Stop(save_before)
        self._reason: int | None = None
        self._due = False
        self._validation_follows = False
        self._written: int | None = None

    def before_train(self, runner: FinetuneRunner) -> None:
        """Clean up after a killed run, and listen to signals from now on."""
        hub = runner.message_hub
        kept = hub.get_info("keep_ckpt_ids") if "keep_ckpt_ids" in hub.runtime_info else []
        self.keep_ckpt_ids = deque(kept)
        elsewhere = self.out_dir is not None and self.out_dir != runner.work_dir
        name = Path(runner.work_dir).name
        self.out_dir = str(Path(self.out_dir) / name) if elsewhere else runner.work_dir
        if is_main_process() and Path(self.out_dir).is_dir():
            remove_leftovers(self.out_dir)
        self._written = runner.iter
        self._stop.install()

    def after_run(self, runner: FinetuneRunner) -> None:
        """Give the signals back."""
        self._stop.uninstall()

    def after_train_iter(
        self,
        runner: FinetuneRunner,
        batch_idx: int,
        data_batch: Mapping[str, Any] | None = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint where one is due, at the end of a step, or when asked to stop."""
        done = runner.iter + 1
        if not self.by_epoch and (
            self.every_n_train_iters(runner, self.interval, self.save_begin)
            or (self.save_last and self.is_last_train_iter(runner))
        ):
            self._due = True
        if not runner.train_loop.step_finished:
            return
        self._reason = self._stop.agreed()
        if self._reason == SAVE:
            self._due, self._reason = True, None
        self._validation_follows = runner.train_loop.validation_follows()
        if not self._validation_follows and not self._epoch_ends(runner, done):
            self._write_what_is_due(runner, runner.epoch, done)

    def after_train_epoch(self, runner: FinetuneRunner) -> None:
        """The same after an epoch, when schedules by epoch have stepped too."""
        if self.by_epoch and (
            self.every_n_epochs(runner, self.interval, self.save_begin)
            or (self.save_last and self.is_last_train_epoch(runner))
        ):
            self._due = True
        if runner.train_loop.step_finished and not self._validation_follows:
            self._write_what_is_due(runner, runner.epoch + 1, runner.iter)

    def after_val_epoch(self, runner: FinetuneRunner, metrics: dict[str, float]) -> None:
        """Keep the best; write what waited for the validation."""
        if self.save_best and metrics:
            self._save_best_checkpoint(runner, metrics)
        self._write_what_is_due(runner, runner.epoch, runner.iter)

    def after_train(self, runner: FinetuneRunner) -> None:
        """Save the end of a run that was stopped early."""
        if self.save_last and runner.iter != self._written:
            self._due = True
            self._write_what_is_due(runner, runner.epoch, runner.iter)
        super().after_train(runner)

    def _write_what_is_due(self, runner: FinetuneRunner, epoch: int, done: int) -> None:
        """Write a checkpoint where one is due; end the run where it was asked to stop."""
        meta = {"epoch": epoch, "iter": done}
        if self._due:
            self._due = False
            self._save_checkpoint_with_step(runner, epoch if self.by_epoch else done, meta)
        elif self._reason is not None:
            self._write(runner, f"iter_{done}.pth", meta)
        if self._reason is not None:
            self._stop.uninstall()
            if not is_main_process():  # one message for all of them
                raise SystemExit(exit_status(self._reason))
            raise RunStopped(
                tr(
                    "{reason}: stopped after iteration {done}; the checkpoint "
                    "{checkpoint} is written.",
                    reason=told(self._reason),
                    done=done,
                    checkpoint=self.last_ckpt,
                ),
                hint=resume_command(self.last_ckpt),
                status=exit_status(self._reason),
            )

    def _epoch_ends(self, runner: FinetuneRunner, done: int) -> bool:
        """Whether the loop calls ``after_train_epoch`` right after this iteration."""
        length = runner.train_loop.epoch_length
        return done == runner.max_iters or (length is not None and done % length == 0)

    def _save_checkpoint_with_step(
        self, runner: FinetuneRunner, step: int, meta: dict[str, int]
    ) -> None:
        """Write one, then delete those that are too many."""
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            self.keep_ckpt_ids.append(step)
        runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        self._write(runner, self.filename_tmpl.format(step), meta)
        while 0 < self.max_keep_ckpts < len(self.keep_ckpt_ids):
            surplus = self.keep_ckpt_ids.popleft()
            if is_main_process():
                remove(Path(self.out_dir) / self.filename_tmpl.format(surplus))

    def _write(self, runner: FinetuneRunner, name: str, meta: dict[str, int]) -> None:
        """Write one and note it as the last."""
        self._written = meta["iter"]
        self.last_ckpt = str(Path(self.out_dir) / name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=dict(meta),
            by_epoch=self.by_epoch,
            **self.args,
        )
        barrier()
        if is_main_process():
            write_text(Path(runner.work_dir) / "last_checkpoint", self.last_ckpt)

    def _save_best_checkpoint(self, runner: FinetuneRunner, metrics: dict[str, float]) -> None:
        """Write ``best_<metric>_iter_N.pth`` where a metric is better than ever; drop the old."""
        if "auto" in self.key_indicators:
            self._init_rule(self.rules, [next(iter(metrics))])
        hub, single = runner.message_hub, len(self.key_indicators) == 1
        for metric, rule in zip(self.key_indicators, self.rules, strict=True):
            suffix = "" if single else f"_{metric}"
            score = metrics.get(metric)
            known = f"best_score{suffix}" in hub.runtime_info
            best = hub.get_info(f"best_score{suffix}") if known else self.init_value_map[rule]
            if score is None or not self.is_better_than[metric](score, best):
                continue
            progress = {"epoch": runner.epoch, "iter": runner.iter}
            file = self.filename_tmpl.format(progress["epoch" if self.by_epoch else "iter"])
            name = f"best_{metric}_{file}".replace("/", "_")
            former = hub.get_info(f"best_ckpt{suffix}") if known else None
            hub.update_info(f"best_score{suffix}", score)
            hub.update_info(f"best_ckpt{suffix}", str(Path(self.out_dir) / name))
            runner.save_checkpoint(
                self.out_dir,
                name,
                save_optimizer=False,
                save_param_scheduler=False,
                meta=progress,
                by_epoch=False,
            )
            if former and Path(former).name != name and is_main_process():
                remove(Path(former))
            runner.logger.info(
                tr(
                    "best so far: {metric} = {score:.4f}, kept in {name}",
                    metric=metric,
                    score=score,
                    name=name,
                )
            )
