"""The start of a training run: from the words of the command line to a runner that trains."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from mmengine.config import Config

from xtuner.config import dump_config, load_config
from xtuner.engine.startup import import_runner
from xtuner.utils.errors import UserError, Where
from xtuner.utils.files import write_text
from xtuner.utils.lang import tr


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
        resume: a checkpoint, or True for the newest good one of the work dir.
        resume_allow: what may have changed since that checkpoint (``resume.KINDS``, ``all``).
        seed: the random seed; the config's when None.
        options: ``key=value`` words that change the config.
        launcher: who started the processes: none, pytorch, slurm or mpi.

    Returns:
        The exit status.

    Raises:
        UserError: for everything a user can mend.
    """
    cfg = prepare(
        config,
        work_dir=work_dir,
        options=options,
        launcher=launcher,
        seed=seed,
        deepspeed=deepspeed,
        fsdp=fsdp or fsdp_offload,
        fsdp_offload=fsdp_offload,
    )
    if cfg.get("framework", "mmengine").lower() == "huggingface":
        from xtuner.engine.huggingface import train as train_with_trainer

        return train_with_trainer(cfg, resume=resume)
    if isinstance(resume, str) and not Path(resume).exists():
        _find_checkpoint(cfg, resume)  # says so before the model is built
    _prepare_data(cfg)
    runner = build_runner(cfg)
    if resume:
        runner.resume_from = _find_checkpoint(cfg, resume)
        runner.resume_allow = resume_allow
    runner.train()
    _leave()
    return 0


def _find_checkpoint(cfg: Config, resume: str | bool) -> Path | None:
    from xtuner.checkpoint.resume import checkpoint_to_resume

    return checkpoint_to_resume(cfg.work_dir, resume)


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
    """
    if checkpoint is not None and not Path(checkpoint).exists():
        raise UserError(tr("there is no such checkpoint."), where=Where(checkpoint))
    folder = work_dir or f"./work_dirs/{Path(config).stem}/test"
    cfg = prepare(config, work_dir=folder, options=options, launcher=launcher)
    cfg.pop("strategy", None)  # there is no optimizer to be cut
    split = next(
        name for name in ("test", "val", "train") if cfg.get(f"{name}_dataloader") is not None
    )
    if split != "test":
        for key in ("dataloader", "evaluator"):
            cfg[f"test_{key}"] = cfg.get(f"{split}_{key}")
        cfg.test_evaluator = cfg.test_evaluator or []
        cfg.test_cfg = {}
        from xtuner.config.adapt.machine import adapt_loops

        adapt_loops(cfg)
    cfg.initial_weights = cfg.get("load_from")  # the reference of DPO is the model before training
    cfg.load_from = checkpoint
    cfg.resume = False
    if _is_first():
        what = checkpoint or tr("the base model (no --checkpoint)")
        print(tr("measuring {what} on the {split} data", what=what, split=split))
    metrics = build_runner(cfg).test()
    if _is_first():
        write_text(Path(cfg.work_dir) / "results.json", json.dumps(metrics, indent=1) + "\n")
    _leave()
    return 0


def prepare(
    config: str,
    *,
    work_dir: str | None,
    options: Sequence[str],
    launcher: str,
    seed: int | None = None,
    deepspeed: str | None = None,
    fsdp: bool = False,
    fsdp_offload: bool = False,
) -> Config:
    """Load a config, make it fit this machine, and write it into its work dir.

    Its ``before_run`` functions are called on the way, by one process of each machine at a time.
    """
    cfg = load_config(config, options)
    name = Path(cfg.filename or config).stem
    cfg.work_dir = work_dir or cfg.get("work_dir") or f"./work_dirs/{name}"
    cfg.launcher = launcher
    if seed is not None:
        cfg.randomness = {**(cfg.get("randomness") or {}), "seed": seed}
    _require_settings(cfg)
    _claim(Path(cfg.work_dir))
    import_runner(_named_optimizer(cfg))
    from xtuner.config.adapt.machine import adapt
    from xtuner.config.adapt.strategy import adapt_strategy
    from xtuner.config.check import check_or_raise

    check_or_raise(cfg)
    said = adapt(cfg, launcher=launcher)
    said += adapt_strategy(cfg, deepspeed=deepspeed, fsdp=fsdp, offload=fsdp_offload)
    _call_before_run(cfg)
    _check_models(cfg)
    if _is_first():
        for line in said:
            print(line)
        write_text(Path(cfg.work_dir) / f"{name}.py", dump_config(cfg))
    return cfg


def _leave() -> None:
    from xtuner.parallel.processes import shutdown_distributed

    shutdown_distributed()


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


def build_runner(cfg: Config) -> Any:
    """Build the model and everything around it, as mmengine's runner does."""
    from xtuner.engine.runner.finetune_runner import FinetuneRunner

    return FinetuneRunner.from_cfg(cfg)


def _require_settings(cfg: Config) -> None:
    """Complain about everything at once that no run can do without."""
    if cfg.get("framework", "mmengine").lower() == "huggingface":
        needed = ("model", "train_dataset", "trainer", "training_args")
    else:
        needed = ("model", "train_dataloader", "optim_wrapper", "train_cfg")
    missing = [key for key in needed if cfg.get(key) is None]
    if missing:
        raise UserError(
            tr("this config sets no {missing}.", missing=", ".join(missing)),
            hint=tr("'xtuner list-cfg' shows whole configs; 'xtuner copy-cfg NAME .' copies one."),
            where=Where(cfg.filename),
        )


def _claim(folder: Path) -> None:
    """Make the work dir and see that it can be written to, before anything takes long."""
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


def _named_optimizer(cfg: Config) -> str | None:
    kind = (cfg.get("optim_wrapper") or {}).get("optimizer", {}).get("type")
    return kind if isinstance(kind, str) else None


def _call_before_run(cfg: Config) -> None:
    """Call the config's own functions, in order; processes of one machine take turns."""
    with FileLock(Path(cfg.work_dir).resolve() / ".before_run.lock"):
        for step in cfg.get("before_run") or []:
            arguments = {key: value for key, value in step.items() if key != "type"}
            step.type(**arguments)


def _check_models(cfg: Config) -> None:
    """See that the models and tokenizers a config names are there or can be fetched."""
    from xtuner.engine.hub import require_reachable

    names = {
        value: key
        for key, value in _names_of_models(cfg.get("model"), "model")
        if isinstance(value, str)
    }
    for name, key in names.items():
        require_reachable(name, Where(cfg.filename, key=key))


def _names_of_models(value: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        found = [
            (f"{path}.{key}", value[key])
            for key in ("pretrained_model_name_or_path",)
            if value.get(key)
        ]
        for key in value:
            found += _names_of_models(value[key], f"{path}.{key}")
        return found
    return []


def _is_first() -> bool:
    """Whether this is the first of all processes, asked before there is a process group."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return rank == "0" or os.environ.get("OMPI_COMM_WORLD_RANK") == "0"
