"""Which strategy a run uses, with all its settings: from the command line and the config.

DeepSpeed's files say ``auto`` where the config decides. Micro-batch, accumulation and clipping are
always the config's: two places for one number would only disagree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from xtuner.config.adapt.engine_types import DEEPSPEED_STRATEGY, FSDP_STRATEGY
from xtuner.config.adapt.machine import has_gpu, supported_dtype
from xtuner.config.values import last_name
from xtuner.configs import UnknownConfig, deepspeed_path
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

AUTO = "auto"
# What a DeepSpeed file may also hold and the config has its own section for.
OF_THE_CONFIG = {
    "optimizer": "optim_wrapper.optimizer",
    "scheduler": "param_scheduler",
    "train_batch_size": "train_dataloader.batch_size",
}


def adapt_strategy(
    config: Config, *, deepspeed: str | None = None, fsdp: bool = False, offload: bool = False
) -> list[str]:
    """Complete ``config.strategy`` in place, from the command line or from the config itself.

    Args:
        config: adapted to the machine already.
        deepspeed: name or path of DeepSpeed settings.
        fsdp: shard with FSDP.
        offload: with FSDP keep shards in the main memory.

    Returns:
        One line for each thing that people should know of.

    Raises:
        UserError: for settings that cannot be read, or contradict each other.
    """
    if deepspeed and fsdp:
        raise UserError(tr("--deepspeed and --fsdp exclude each other."))
    if deepspeed:
        config.strategy = dict(type="DeepSpeedStrategy", config=deepspeed)
    elif fsdp:
        config.strategy = dict(type="FSDPStrategy", cpu_offload=offload)
    strategy = config.get("strategy")
    if not strategy:
        return []
    if config.get("framework", "mmengine").lower() == "huggingface":
        raise UserError(
            tr(
                "transformers' Trainer spreads the model in its own way: --deepspeed, --fsdp and "
                "strategy are not for it."
            ),
            hint="training_args = dict(..., deepspeed='ds.json')",
            where=Where(config.filename, key="framework"),
        )
    kind = last_name(dict.get(strategy, "type"))
    if kind == "DeepSpeedStrategy":
        return _adapt_deepspeed(config)
    if kind == "FSDPStrategy":
        return _adapt_fsdp(config)
    raise UserError(
        tr("there is no strategy {kind!r}.", kind=kind),
        hint="strategy = dict(type=DeepSpeedStrategy, config='deepspeed_zero2')",
        where=Where(config.filename, key="strategy.type"),
    )


def _adapt_fsdp(config: Config) -> list[str]:
    config.strategy.type = FSDP_STRATEGY
    config.strategy.setdefault("dtype", config.optim_wrapper.get("dtype") or "float32")
    return []


def _adapt_deepspeed(config: Config) -> list[str]:
    _refuse_skipped_steps(config)
    notes: list[str] = []
    strategy = dict(config.strategy)
    given = _read(strategy.pop("config", {}))
    kept = {"exclude_frozen_parameters"} & strategy.keys()
    # v0.1 wrote the config's numbers beside ``config``, and mmengine takes whole sections there.
    sections = {
        key: value
        for key, value in strategy.items()
        if key not in {"type", "sequence_parallel_size", *kept}
    }
    settings = {**given, **sections}
    settings.setdefault("zero_allow_untested_optimizer", True)
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    settings.setdefault("steps_per_print", 10**13)
    for key, ours in OF_THE_CONFIG.items():
        if settings.pop(key, AUTO) != AUTO:
            notes.append(
                tr(
                    "DeepSpeed's '{key}' is left out: {ours} of the config counts.",
                    key=key,
                    ours=ours,
                )
            )
    for key, value, ours in _numbers(config, notes):
        if settings.get(key, AUTO) not in (AUTO, value):
            notes.append(
                tr(
                    "DeepSpeed's {key}={file_value} is not {ours}={value} of the config: "
                    "{value} is used.",
                    key=key,
                    file_value=settings[key],
                    ours=ours,
                    value=value,
                )
            )
        settings[key] = value
    _set_dtype(settings, config.optim_wrapper.get("dtype") or "float32", notes)
    if not has_gpu():
        _unpin(settings)
    config.strategy = dict(
        type=DEEPSPEED_STRATEGY,
        config=_without_auto(settings),
        **{key: strategy[key] for key in kept},
    )
    return notes


def _refuse_skipped_steps(config: Config) -> None:
    """DeepSpeed has stepped by the time a loss is judged, unless fp16 overflowed."""
    for key in ("on_bad_loss", "on_spike"):
        if (config.get("train_cfg") or {}).get(key) == "skip":
            raise UserError(
                tr("DeepSpeed clips and steps at once: a step cannot be left out for its loss."),
                hint=tr("set {key} to 'stop' or 'continue', or train with --fsdp.", key=key),
                where=Where(config.filename, key=f"train_cfg.{key}"),
            )


def _read(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed settings: given as a dict, as a path, or by a published name."""
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config)
    if not path.is_file():
        try:
            path = deepspeed_path(path.name.removesuffix(".json"))
        except UnknownConfig as error:
            raise UserError(
                tr("there is no DeepSpeed config {config!r}.", config=config),
                hint=tr(
                    "a path, or one of deepspeed_zero1, deepspeed_zero2, deepspeed_zero2_offload, "
                    "deepspeed_zero3, deepspeed_zero3_offload."
                ),
            ) from error
    try:
        settings = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        line = getattr(error, "lineno", None)
        raise UserError(
            tr("this is not JSON: {error}", error=error), where=Where(str(path), line)
        ) from error
    if not isinstance(settings, dict):
        raise UserError(
            tr("DeepSpeed settings are one JSON object."),
            where=Where(str(path)),
        )
    return settings


def _numbers(config: Config, notes: list[str]) -> list[tuple[str, Any, str]]:
    """What the config decides: DeepSpeed's key, the value, and where the config has it."""
    wrapper, loader = config.optim_wrapper, config.train_dataloader
    sampler = loader.get("batch_sampler") or {}
    batch = loader.get("batch_size") or sampler.get("batch_size") or 1
    clip = dict(wrapper.get("clip_grad") or {})
    by_norm = clip.get("type", "norm") == "norm" and clip.get("norm_type", 2) == 2
    if not by_norm:
        notes.append(
            tr("DeepSpeed clips by the 2-norm only: clip_grad={clip} is left out.", clip=clip)
        )
    return [
        ("train_micro_batch_size_per_gpu", batch, "train_dataloader.batch_size"),
        (
            "gradient_accumulation_steps",
            wrapper.get("accumulative_counts", 1),
            "optim_wrapper.accumulative_counts",
        ),
        (
            "gradient_clipping",
            float(clip.get("max_norm", 0.0)) if by_norm else 0.0,
            "optim_wrapper.clip_grad.max_norm",
        ),
    ]


def _set_dtype(settings: dict[str, Any], wanted: str, notes: list[str]) -> None:
    """Switch DeepSpeed's fp16 or bf16 on: its own choice, else the config's, as the device can."""
    for section, dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
        if dict(settings.get(section) or {}).get("enabled") is True:
            wanted = dtype
    used = supported_dtype(wanted)
    if used != wanted:
        notes.append(
            tr(
                "DeepSpeed's {wanted} does not run on this machine: {used} is used.",
                wanted=wanted,
                used=used,
            )
        )
    for section, dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
        settings[section] = {**(settings.get(section) or {}), "enabled": used == dtype}


def _unpin(settings: dict[str, Any]) -> None:
    """Pinned memory is for copies to a GPU."""
    zero = dict(settings.get("zero_optimization") or {})
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key):
            zero[key] = {**zero[key], "pin_memory": False}
    settings["zero_optimization"] = zero


def _without_auto(value: object) -> Any:
    """Leave out what is still ``auto``: DeepSpeed has a default for it."""
    if isinstance(value, Mapping):
        return {name: _without_auto(item) for name, item in value.items() if item != AUTO}
    return value
