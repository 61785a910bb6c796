"""The runner: mmengine's, with our loop, optimizer, checkpoints and a quiet terminal."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.device import get_device
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import (
    CheckpointHook,
    DistSamplerSeedHook,
    Hook,
    IterTimerHook,
    LoggerHook,
    RuntimeInfoHook,
)
from mmengine.logging import MMLogger
from mmengine.registry import OPTIMIZERS, PARAM_SCHEDULERS
from mmengine.runner import Runner

from xtuner.checkpoint import checkpoint, resume, run_state
from xtuner.checkpoint.hyper_parameters import initial_groups
from xtuner.checkpoint.verify import find_corruption_together, require_intact
from xtuner.doctor.places import Tracer
from xtuner.engine import reference
from xtuner.engine._strategy.strategy import Strategy
from xtuner.engine.hooks.metrics_hook import MetricsHook
from xtuner.engine.hooks.param_scheduler_hook import ParamSchedulerHook
from xtuner.engine.hooks.progress_hook import ProgressHook
from xtuner.engine.optim import FinetuneOptimWrapper, parameter_groups
from xtuner.engine.runner.loops import TrainLoop
from xtuner.engine.runner.scalar_visualizer import ScalarVisualizer
from xtuner.engine.schedules import RunLength, in_optimizer_steps, is_too_short
from xtuner.parallel.processes import init_distributed
from xtuner.parallel.sequence.groups import (
    get_sequence_parallel_world_size,
    init_sequence_parallel,
)
from xtuner.parallel.unwrap import unwrap_model
from xtuner.registry import BUILDER
from xtuner.utils.cpu import bound_known_products
from xtuner.utils.errors import UserError, Where
from xtuner.utils.gpu import use_expandable_segments
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from mmengine.optim import OptimWrapper
    from mmengine.visualization import Visualizer

# Without these the training is not the one that was asked for, so their failure ends it.
ESSENTIAL_HOOKS = (CheckpointHook, ParamSchedulerHook, DistSamplerSeedHook, RuntimeInfoHook)
# These do not exchange anything between processes: one that fails keeps no other waiting.
LOCAL_HOOKS = (MetricsHook, ProgressHook, LoggerHook, IterTimerHook)
_RUNS = itertools.count()


class FinetuneRunner(Runner):
    """Builds everything of a config and runs it.

    What differs from mmengine's runner: the loop's contract (see ``loops``), the strategies (see
    ``_strategy``), the optimizer holds only what is trained, checkpoints are plain
    data, mmengine's log lines go to the log file instead of the terminal, and a hook that fails is
    reported without ending the training (unless it saves, or the training depends on it).
    """

    strategy = Strategy()
    model: Any
    fingerprints: Mapping[str, Any] = {}
    initial_groups: Sequence[Mapping[str, Any]] = ()
    resume_from: Path | None = None
    _tracer: Tracer | None = None
    resume_allow: Sequence[str] = ()
    readiness: Sequence[str] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # mmengine keeps loggers and hubs by the experiment's name and its start in seconds; two
        # runs of one process must not share them.
        number = next(_RUNS)
        if number and not kwargs.get("experiment_name"):
            kwargs["experiment_name"] = f"run_{number}"
        self.failed_hooks: list[str] = []
        super().__init__(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return torch.device(get_device())

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The context of a forward without gradients, in the precision of the training."""
        if isinstance(self.optim_wrapper, FinetuneOptimWrapper):
            return self.optim_wrapper.optim_context(self.model)
        return contextlib.nullcontext()

    def trace(self, batch: Mapping[str, Any]) -> list[Any]:
        """The rows a micro-batch was made of, as ``file:line`` where that is known."""
        if self._tracer is None:
            self._tracer = Tracer((self.cfg.get("train_dataloader") or {}).get("dataset"))
        return self._tracer(batch["data"])

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        """Join the other processes, where there are any, then do as mmengine does.

        The strategy is built here: some must be there before the model.
        """
        bound_known_products()
        use_expandable_segments()
        if self._launcher != "none" and not torch.distributed.is_initialized():
            backend = env_cfg.get("dist_cfg", {}).get("backend", "nccl")
            if backend == "nccl" and not torch.cuda.is_available():
                backend = "gloo"  # mmengine's default is nccl where a config has no env_cfg
            init_distributed(self._launcher, backend)
        _share_rows(self.cfg.get("sequence_parallel_size", 1), self.cfg.filename)
        with warnings.catch_warnings():  # about the numbers of threads that it sets
            warnings.simplefilter("ignore")
            super().setup_env(env_cfg)
        if self.cfg.get("strategy"):
            self.strategy = BUILDER.build(self.cfg.strategy)
        self.strategy.prepare()

    def build_logger(self, *args: object, **kwargs: object) -> MMLogger:
        """Build mmengine's logger; on the terminal it shows warnings and errors only."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handleError = functools.partial(_report_once, handler)  # type: ignore[method-assign]
                continue
            handler.setLevel(max(handler.level, logging.WARNING))
            handler.addFilter(_is_for_people)
        return logger

    def build_visualizer(self, visualizer: Visualizer | dict[str, Any] | None = None) -> Any:
        """Build the config's visualizer; without one, the numbers are written to a file."""
        if visualizer is not None:
            return super().build_visualizer(visualizer)
        return ScalarVisualizer.get_instance(self._experiment_name, save_dir=self._log_dir)

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        import transformers

        from xtuner.version import __version__

        self.logger.info(
            "xtuner %s, torch %s, transformers %s, Python %s on %s; device %s, %d process(es), "
            "seed %s",
            __version__,
            torch.__version__,
            transformers.__version__,
            platform.python_version(),
            platform.platform(),
            self.device,
            get_world_size(),
            self.seed,
        )
        self.logger.info("Config:\n%s", self.cfg.pretty_text)

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: Any) -> torch.nn.Module:
        """Move the model to its device and, with several processes, make them share gradients."""
        from xtuner.model.base import FinetuneModel

        if get_sequence_parallel_world_size() > 1 and not isinstance(model, FinetuneModel):
            raise UserError(
                tr(
                    "{model_type} cannot leave a part of each row to other processes.",
                    model_type=type(model).__name__,
                ),
                hint="sequence_parallel_size = 1",
                where=Where(self.cfg.filename, key="sequence_parallel_size"),
            )
        settings = dict(model_wrapper_cfg or {})
        settings.pop("type", None)
        settings.setdefault("find_unused_parameters", self.cfg.get("find_unused_parameters", False))
        settings.setdefault("broadcast_buffers", False)
        settings.setdefault("gradient_as_bucket_view", True)
        if reference.has_reference(model) and _initial_weights(self) is not None:
            model.keep_initial_adapter()  # the loaded one: there is no other way to tell it later
        return self.strategy.wrap(model, self.device, settings)

    def _init_model_weights(self) -> None:
        """Nothing to do: weights come from the model itself. mmengine would draw them anew."""

    def build_optim_wrapper(self, optim_wrapper: OptimWrapper | Mapping[str, Any]) -> Any:
        """Build the optimizer over what is trained, and its wrapper."""
        if not isinstance(optim_wrapper, Mapping) or "constructor" in optim_wrapper:
            return super().build_optim_wrapper(optim_wrapper)
        settings = dict(optim_wrapper)
        optimizer = dict(settings.pop("optimizer"))
        groups = parameter_groups(
            self.model,
            lr=optimizer.get("lr"),
            weight_decay=optimizer.get("weight_decay"),
            **(settings.pop("paramwise_cfg", None) or {}),
        )
        if not groups:
            raise UserError(
                tr("nothing of the model is trained: all its parameters are frozen."),
                hint=tr(
                    "give the model a lora=dict(type=LoraConfig, ...), or load it unquantised."
                ),
            )
        built = OPTIMIZERS.build({**optimizer, "params": groups})
        wrapper = settings.pop("type", FinetuneOptimWrapper)
        self.model, bound = self.strategy.setup(self.model, wrapper(optimizer=built, **settings))
        return bound

    def _build_param_scheduler(self, scheduler: object, optim_wrapper: OptimWrapper) -> list[Any]:
        """Build the schedules in optimizer steps, without those of at most one step.

        A warm-up over 3 % of a short run may end before its first step; and mmengine's schedules
        need a second one to arrive: of a warm-up over one step the whole run would keep the first,
        tiny rate.
        """
        loop = self.train_loop
        run = RunLength(
            loop.max_iters, loop.epoch_length, loop.accumulative_counts, loop.epochs_asked
        )
        given = scheduler if isinstance(scheduler, (list, tuple)) else [scheduler]
        built = []
        for each in given:
            if not isinstance(each, Mapping):
                built.append(each)
                continue
            settings = {"end": loop.max_epochs, **in_optimizer_steps(each, run)}
            if is_too_short(settings):
                text = tr("left out, as it covers at most one step of this run: {each}", each=each)
                self.logger.info(text)
                continue
            built.append(
                PARAM_SCHEDULERS.build(settings, default_args={"optimizer": optim_wrapper})
            )
        return built

    def call_hook(self, fn_name: str, **kwargs: object) -> None:
        """Call the hooks; one that fails says so and does not end the training.

        The exceptions are ``UserError`` (meant to end it), hooks with ``essential = True`` and
        those of mmengine that save or that the training depends on.
        """
        for hook in self._hooks:
            method = getattr(hook, fn_name, None)
            if method is None:
                continue
            try:
                method(self, **kwargs)
            except UserError:
                raise
            except Exception as error:
                if isinstance(hook, ESSENTIAL_HOOKS) or getattr(hook, "essential", False):
                    raise
                failed = f"{type(hook).__name__}.{fn_name}: {type(error).__name__}: {error}"
                self.failed_hooks.append(failed)
                _report_failed_hook(self.logger, hook, fn_name, error)

    def dump_config(self) -> None:
        """Nothing to do: the start of the run has written the config."""

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict[str, Any] | None = None,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict[str, Any] | None = None,
        by_epoch: bool = True,
        backend_args: dict[str, Any] | None = None,
    ) -> None:
        """Take down the run's state and write it (called on every rank, written by the first)."""
        state = run_state.collect(
            self,
            save_optimizer=save_optimizer,
            save_param_scheduler=save_param_scheduler,
            meta=meta,
            by_epoch=by_epoch,
        )
        path = Path(out_dir) / filename
        self.strategy.save(path, state, self.model, self.optim_wrapper, save_optimizer)

    def load_or_resume(self) -> None:
        """Load initial weights, set the reference of DPO to them, then resume where asked.

        Resuming is asked for by ``resume_from`` (the command line) or by the config's
        ``resume = True``, with ``load_from`` for a path. ``load_from`` alone names the initial
        weights; in a test it names what is tested, and ``initial_weights`` those.
        """
        training = isinstance(self._train_loop, TrainLoop)
        wanted = self.resume_from
        if wanted is None and self._resume:
            wanted = resume.checkpoint_to_resume(
                self.work_dir, self._load_from or True, self.resume_allow
            )
        initial = _initial_weights(self)
        model: Any = unwrap_model(self.model)
        with_reference = reference.has_reference(model)
        if initial is not None and (wanted is None or with_reference):
            self.load_checkpoint(initial)
            if with_reference:
                model.sync_reference()
        if training:  # a test does not load the training's data
            self.fingerprints = resume.of_run(self)
            self.initial_groups = initial_groups(self.optim_wrapper)
        reference.prepare_reference(self)
        if wanted is not None:
            resume.resume_run(self, wanted, self.resume_allow)
        elif not training and self._load_from is not None:
            self.load_checkpoint(self._load_from)
        elif training and with_reference:
            model.compare_start()

    def register_default_hooks(self, hooks: dict[str, Any] | None = None) -> None:
        """Register mmengine's default hooks and ours for watching."""
        wanted = {"metrics": dict(type=MetricsHook), "progress": dict(type=ProgressHook)}
        wanted.update(hooks or {})
        schedules = wanted.get("param_scheduler", {})
        if isinstance(schedules, Mapping) and _is_mmengines(schedules.get("type")):
            wanted["param_scheduler"] = {**schedules, "type": ParamSchedulerHook}
        for name in ("metrics", "progress"):
            if wanted[name] is None:  # switched off in the config
                del wanted[name]
        super().register_default_hooks(wanted)

    def train(self) -> torch.nn.Module:
        """Train; the terminal is restored however it ends."""
        try:
            with warnings.catch_warnings():
                # Under loss scaling the first steps of the optimizer may be left out.
                warnings.filterwarnings("ignore", message=r"Detected call of `scheduler\.step")
                return super().train()
        finally:
            for hook in self._hooks:
                if isinstance(hook, ProgressHook):
                    hook.close()

    def resume(self, filename: str, *args: object, **kwargs: object) -> None:
        """Restore the state that a checkpoint holds."""
        run_state.restore(self, checkpoint.load_checkpoint(filename))
        self._has_loaded = True

    def load_checkpoint(self, filename: str, *args: object, **kwargs: object) -> dict[str, Any]:
        """Load only the weights of a checkpoint."""
        require_intact(Path(filename), find_corruption_together)
        state = {"state_dict": checkpoint.load_state_dict(filename, verify=False)}
        self.call_hook("after_load_checkpoint", checkpoint=state)
        misfits = self.strategy.load_weights(
            self.model, self.optim_wrapper, state["state_dict"], partly=True
        )
        if misfits:
            self.logger.warning(f"{filename}: {misfits}")
        self._has_loaded = True
        return state


def _share_rows(size: object, config: str | None) -> None:
    """Make the groups of processes that share rows.

    Raises:
        UserError: when they cannot be made of the processes that there are.
    """
    world_size = get_world_size()
    if not isinstance(size, int) or size < 1 or world_size % size:
        raise UserError(
            tr(
                "sequence_parallel_size={size} does not divide the number of processes, "
                "{world_size}.",
                size=size,
                world_size=world_size,
            ),
            hint=tr(
                "start a multiple of it (NPROC_PER_NODE={size} xtuner train ...), or set "
                "sequence_parallel_size=1.",
                size=size,
            ),
            where=Where(config, key="sequence_parallel_size"),
        )
    init_sequence_parallel(size)


def _is_for_people(record: logging.LogRecord) -> bool:
    """Whether a warning is of use to someone who trains: not what mmengine says of itself."""
    text = record.getMessage()
    of_mmengine = ("will be deprecated in future", "registry tree", "has no metainfo")
    return not any(words in text for words in of_mmengine)


def _report_once(handler: logging.FileHandler, record: logging.LogRecord) -> None:
    """Say that a log file cannot be written, and leave it: logging prints a traceback each time.

    Args:
        handler: of the file; called where it failed to write a record.
        record: what could not be written.
    """
    error = sys.exc_info()[1]
    if not isinstance(error, OSError):
        logging.Handler.handleError(handler, record)
        return
    handler.setLevel(logging.CRITICAL + 1)
    print(
        tr(
            "{file} cannot be written ({why}); training continues without it.",
            file=handler.baseFilename,
            why=error.strerror or error,
        ),
        file=sys.stderr,
    )


def _is_mmengines(hook_type: object) -> bool:
    """Whether a hook's type, or its name, is mmengine's ``ParamSchedulerHook``, or not given."""
    name = getattr(hook_type, "__name__", hook_type)
    return name in (None, "ParamSchedulerHook")


def _initial_weights(runner: FinetuneRunner) -> str | None:
    """The checkpoint whose weights the training begins with; None for those of the model."""
    if "initial_weights" in runner.cfg:
        return runner.cfg.initial_weights
    return None if runner._resume else runner._load_from


def _report_failed_hook(logger: logging.Logger, hook: Hook, fn_name: str, error: Exception) -> None:
    """Say that a hook failed; the log file gets the details.

    Raises:
        UserError: with several processes, unless the hook is ``local``: the others may be
            waiting for this one within the hook.
    """
    if isinstance(error, BrokenPipeError):  # `xtuner train ... | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    name = type(hook).__name__
    logger.info("%s.%s failed", name, fn_name, exc_info=error)
    failed = f"{name}.{fn_name}", f"{type(error).__name__}: {error}"
    if get_world_size() > 1 and not getattr(hook, "local", isinstance(hook, LOCAL_HOOKS)):
        raise UserError(
            tr(
                "{hook} failed on rank {rank} ({error}); the training ends, as the "
                "other processes may be waiting for this one.",
                hook=failed[0],
                rank=get_rank(),
                error=failed[1],
            ),
            hint=tr("The log file has the details. Take the hook out of the config."),
        ) from error
    logger.warning(
        tr(
            "{hook} failed ({error}); training continues without it. The log file has the details.",
            hook=failed[0],
            error=failed[1],
        )
    )
