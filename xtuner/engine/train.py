"""The start of a run: from the words of the command line to a runner that trains or tests."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from mmengine.config import Config

from xtuner.config.adapt.adapter import RunOptions, adapt
from xtuner.config.adapt.machine import adapt_loops
from xtuner.config.check.checker import check_or_raise
from xtuner.config.check.data_files import require_data_files
from xtuner.config.check.problem import Context
from xtuner.config.document import ConfigDocument
from xtuner.config.dump import write_config
from xtuner.config.load import load
from xtuner.config.override import override
from xtuner.config.values import copyable, iter_dicts
from xtuner.engine.run_folder import run_folder
from xtuner.engine.startup import import_runner, optimizer_name
from xtuner.engine.work_dir_lock import GUARD, locked, require_free
from xtuner.utils.errors import UserError, Where, activity
from xtuner.utils.files import write_text
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from xtuner.engine.runner.finetune_runner import FinetuneRunner


def train(
    config: str,
    *,
    work_dir: str | None = None,
    deepspeed: str | None = None,
    fsdp: bool = False,
    fsdp_offload: bool = False,
    resume: str | bool = False,
    resume_allow: Sequence[str] = (),
    seed: int | None = None,
    overwrite: bool = False,
    options: Sequence[str] = (),
    launcher: str = "none",
) -> int:
    """Train as a config says.

    Args:
        config: name or path of the config.
        work_dir: where everything goes; the config's, else ``work_dirs/<config name>``.
        deepspeed: a DeepSpeed config, by path or name.
        fsdp: shard the model with FSDP.
        fsdp_offload: the same, with the shards in main memory.
        resume: a checkpoint, or True for the newest usable one in the work dir.
        resume_allow: what may have changed since that checkpoint (``resume.KINDS``, ``all``).
        seed: the random seed; the config's when None.
        overwrite: replace the checkpoints that the work dir has.
        options: ``key=value`` words that change the config.
        launcher: who started the processes: none, pytorch, slurm or mpi.

    Returns:
        The exit status.

    Raises:
        UserError: for everything that a user can fix.
    """
    run = RunOptions(work_dir, launcher, seed, deepspeed, fsdp, fsdp_offload)

    def choose(name: str, values: Mapping[str, Any]) -> str:
        given = work_dir or values.get("work_dir")
        folder = given or f"./work_dirs/{name}"
        if is_first(launcher) and (given or overwrite):
            require_free(Path(folder))
        return run_folder(
            folder,
            chosen=bool(given),
            resume=bool(resume or values.get("resume")),
            overwrite=overwrite,
            alone=launcher == "none",
        )

    with contextlib.ExitStack() as held:
        cfg = prepare(config, options, run, held, choose).config
        with activity(tr("training"), cfg.work_dir):
            return _train(cfg, resume, resume_allow)


def _train(cfg: Config, resume: str | bool, resume_allow: Sequence[str]) -> int:
    if _uses_trainer(cfg):
        from xtuner.engine.huggingface import train as train_with_trainer

        return train_with_trainer(cfg, resume=resume)
    if isinstance(resume, str) and not Path(resume).exists():
        _find_checkpoint(cfg, resume, resume_allow)  # says so before the model is built
    with activity(tr("preparing the data")):
        _prepare_data(cfg)
    with activity(tr("building the data loaders and the model")):
        runner = build_training_runner(cfg)
    if resume:
        runner.resume_from = _find_checkpoint(cfg, resume, resume_allow)
        runner.resume_allow = resume_allow
    runner.train()
    _shut_down()
    return 0


def test(
    config: str,
    *,
    checkpoint: str | None = None,
    work_dir: str | None = None,
    options: Sequence[str] = (),
    launcher: str = "none",
) -> int:
    """Measure a checkpoint: with the config's test data and metrics, or by the loss.

    Args:
        config: name or path of the config.
        checkpoint: what to measure; the base model when None.
        work_dir: where the results go; ``<the training's work dir>/test`` by default.
        options: ``key=value`` words that change the config.
        launcher: who started the processes.

    Returns:
        The exit status.

    Raises:
        UserError: for everything that a user can fix.
    """
    if checkpoint is not None and not Path(checkpoint).exists():
        raise UserError(tr("there is no such checkpoint."), where=Where(checkpoint))
    folder = work_dir or f"./work_dirs/{Path(config).stem}/test"
    cfg = prepare(config, options, RunOptions(folder, launcher)).config
    split = _use_test_loop(cfg)
    cfg.initial_weights = cfg.get("load_from")  # the reference of DPO is the model before training
    cfg.load_from = checkpoint
    cfg.resume = False
    if is_first(launcher):
        what = checkpoint or tr("the base model (no --checkpoint)")
        print(tr("measuring {what} on the {split} data", what=what, split=split))
    with activity(tr("measuring"), cfg.work_dir):
        metrics = build_runner(cfg).test()
    if is_first(launcher):
        write_text(Path(cfg.work_dir) / "results.json", json.dumps(metrics, indent=1) + "\n")
    _shut_down()
    return 0


def prepare(
    config: str,
    options: Sequence[str],
    run: RunOptions,
    held: contextlib.ExitStack | None = None,
    choose: Callable[[str, Mapping[str, Any]], str] | None = None,
) -> ConfigDocument:
    """The stages of a config before a run: load, override, check, adapt, write.

    Its ``before_run`` functions are called on the way, by one process of each machine at a time.

    Args:
        config: name or path of the config.
        options: ``key=value`` words that change it.
        run: what else the command line says.
        choose: gives the run's folder, from the config's name and values.
        held: takes the work dir's lock, where the run is to have the folder for itself.

    Returns:
        The config as the run uses it; it has been written into its work dir.

    Raises:
        UserError: for everything that a user can fix.
    """
    document = load(config)
    document = override(document, options)
    check_or_raise(document)
    import_runner(optimizer_name(document))
    if choose is not None:
        run = replace(run, work_dir=choose(document.name, document.values))
    document = adapt(document, run)
    work_dir = _writable(Path(document.config.work_dir))
    if held is not None and is_first(run.launcher):
        held.enter_context(locked(work_dir))
    _call_before_run(document)
    require_data_files(Context(document), document.file)
    _require_models(document)
    if is_first(run.launcher):
        for note in document.notes:
            print(note)
        write_config(document, work_dir / f"{document.name}.py")
    return document


def is_first(launcher: str) -> bool:
    """Whether this is the first of all processes, known before there is a process group.

    Args:
        launcher: who started the processes; each sets its own variables.
    """
    from xtuner.parallel.processes import LAUNCHER_ENV

    return launcher == "none" or os.environ.get(LAUNCHER_ENV[launcher][0], "0") == "0"


def build_training_runner(cfg: Config) -> FinetuneRunner:
    """Build the training data, then the model and everything around it."""
    from xtuner.engine.memory_forecast import memory_warning
    from xtuner.engine.runner.training_runner import TrainingRunner

    # Before there is a process group, and before DeepSpeed shards every model that is built.
    warning = memory_warning(cfg) if is_first(cfg.get("launcher", "none")) else None
    if warning is not None:
        print(warning, flush=True)
    return TrainingRunner.from_cfg(copyable(cfg))


def build_runner(cfg: Config) -> FinetuneRunner:
    """Build the model and everything around it, as mmengine's runner does."""
    from xtuner.engine.runner.finetune_runner import FinetuneRunner

    return FinetuneRunner.from_cfg(copyable(cfg))


def _shut_down() -> None:
    from xtuner.parallel.processes import shutdown_distributed

    shutdown_distributed()


def _find_checkpoint(cfg: Config, resume: str | bool, allowed: Sequence[str]) -> Path | None:
    from xtuner.checkpoint.resume import checkpoint_to_resume

    return checkpoint_to_resume(cfg.work_dir, resume, allowed)


def _prepare_data(cfg: Config) -> None:
    """With several processes fill the data's cache before they meet, however long it takes.

    The first process of each machine prepares, the others wait for its lock. Once the processes
    have met, each reads the cache, and no collective operation waits for data.
    """
    from xtuner.registry import BUILDER

    if cfg.launcher == "none":
        return
    for key in ("train_dataloader", "val_dataloader"):
        dataset = (cfg.get(key) or {}).get("dataset")
        if not isinstance(dataset, dict):
            continue
        kind = dataset.get("type")
        if str(getattr(kind, "__module__", "")).startswith("xtuner.dataset"):
            BUILDER.build(dataset)


def _use_test_loop(cfg: Config) -> str:
    """Let the test loop read the config's test data, else its validation or training data.

    Returns:
        Which: ``test``, ``val`` or ``train``.
    """
    cfg.pop("strategy", None)  # no optimizer is sharded
    splits = ("test", "val", "train")
    split = next(name for name in splits if cfg.get(f"{name}_dataloader") is not None)
    if split != "test":
        for key in ("dataloader", "evaluator"):
            cfg[f"test_{key}"] = cfg.get(f"{split}_{key}")
        cfg.test_evaluator = cfg.test_evaluator or []
        cfg.test_cfg = {}
        adapt_loops(cfg)
    return split


def _uses_trainer(cfg: Config) -> bool:
    """Whether transformers' Trainer trains, and not our runner."""
    return bool(cfg.get("framework", "mmengine").lower() == "huggingface")


def _writable(folder: Path) -> Path:
    """Make the work dir and write to it once, before anything takes long."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            tr("the work dir cannot be written to: {strerror}.", strerror=error.strerror),
            hint=tr("choose another with '--work-dir'."),
            where=Where(str(folder)),
        ) from error
    return folder


def _call_before_run(document: ConfigDocument) -> None:
    """Call the config's own functions, in order; processes of one machine take turns."""
    cfg = document.config
    with FileLock(Path(cfg.work_dir).resolve() / GUARD):
        for step in cfg.get("before_run") or []:
            arguments = {key: value for key, value in step.items() if key != "type"}
            step.type(**arguments)


def _require_models(document: ConfigDocument) -> None:
    """Check that the models that a config names exist or can be downloaded."""
    from xtuner.utils.hub import require_available

    keys: dict[str, str] = {}
    for path, part in iter_dicts(document.values.get("model"), "model"):
        name = dict.get(part, "pretrained_model_name_or_path")
        if name and isinstance(name, str):
            keys[name] = f"{path}.pretrained_model_name_or_path"
    for name, key in keys.items():
        require_available(name, Where(document.file, key=key))
