"""Adapting a config to this machine: its devices, the dtypes they compute in, what is installed."""

from __future__ import annotations

import importlib
from typing import Any

from mmengine.config import Config, ConfigDict

from xtuner.config.adapt.engine_types import (
    CHECKPOINT_HOOK,
    EARLY_STOPPING_HOOK,
    HOOKS,
    LOOPS,
    OPTIM_WRAPPER,
    SEQUENCE_PARALLEL_SAMPLER,
)
from xtuner.config.values import dotted_name, iter_dicts, last_name
from xtuner.utils.dtypes import dtype_name, gpu_has_bf16, torch_dtype
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

HALF_PRECISION = ("float16", "bfloat16")
# Optimizers of torch that have a fused form, on a CPU as on a GPU.
FUSED = ("Adam", "AdamW")
FORMS = {"fused", "foreach", "capturable", "differentiable"}
"""Arguments of torch's optimizers that choose how a step is computed."""
MMENGINE_LOOPS = ("EpochBasedTrainLoop", "IterBasedTrainLoop")


def adapt_to_machine(config: Config, *, launcher: str = "none") -> list[str]:
    """Change a config in place so that it runs here.

    Args:
        config: a loaded config, in today's arguments.
        launcher: who started the processes; with ``none`` there is one.

    Returns:
        One line for each change that a user should know of.
    """
    notes = _adapt_model(config)
    notes += _adapt_optimizer(config)
    notes += _adapt_sequence_parallel(config)
    adapt_loops(config)
    _adapt_hooks(config)
    backend = config.get("env_cfg", {}).get("dist_cfg", {}).get("backend")
    if backend == "nccl" and not has_gpu():
        config.env_cfg.dist_cfg.backend = "gloo"
        if launcher != "none":
            notes.append(tr("nccl needs GPUs, and there are none: gloo is used."))
    return notes


def supported_dtype(dtype: str) -> str:
    """The dtype to use in place of ``dtype`` on this machine: itself, where it is supported.

    Args:
        dtype: ``float16``, ``bfloat16`` or ``float32``.
    """
    if dtype not in HALF_PRECISION:
        return dtype
    import torch

    if torch.cuda.is_available():
        return dtype if dtype == "float16" or gpu_has_bf16() else "float16"
    return "bfloat16" if _cpu_has_bf16() else "float32"


def has_gpu() -> bool:
    """Whether torch can use a GPU."""
    import torch

    return torch.cuda.is_available()


def _cpu_has_bf16() -> bool:
    import torch

    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("architecture") != "x86_64":
        return True
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _adapt_optimizer(config: Config) -> list[str]:
    notes: list[str] = []
    wrapper = config.get("optim_wrapper")
    if not wrapper or "optimizer" not in wrapper or "constructor" in wrapper:
        return notes
    kind = last_name(dict.get(wrapper, "type", "OptimWrapper"))
    if kind not in ("AmpOptimWrapper", "OptimWrapper", "FinetuneOptimWrapper"):
        return notes
    wrapper.type = OPTIM_WRAPPER
    wrapper.device = "cuda" if has_gpu() else "cpu"
    if kind == "AmpOptimWrapper":
        wrapper.setdefault("dtype", "float16")
        wrapper.pop("use_fsdp", None)
    if wrapper.get("dtype") is not None:
        wanted = dtype_name(wrapper.dtype)
        wrapper.dtype = supported_dtype(wanted)
        if wrapper.dtype != wanted:
            notes.append(_other_dtype(wanted, wrapper.dtype, "optim_wrapper.dtype"))
    optimizer = dict.get(wrapper.optimizer, "type")
    is_torch = isinstance(optimizer, str) or (dotted_name(optimizer) or ("",))[0].startswith(
        "torch."
    )
    if is_torch and last_name(optimizer) in FUSED and not FORMS & set(wrapper.optimizer):
        wrapper.optimizer.fused = True
    return notes


def _adapt_model(config: Config) -> list[str]:
    notes: list[str] = []
    for path, part in iter_dicts(config.get("model"), "model"):
        for key in ("dtype", "bnb_4bit_compute_dtype"):
            value = part.get(key)
            name = dtype_name(value)
            used = supported_dtype(name)
            if used != name:
                part[key] = used if isinstance(value, str) else torch_dtype(used)
                notes.append(_other_dtype(name, used, f"{path}.{key}"))
        wanted = part.get("attn_implementation")
        if wanted == "flash_attention_2" and not has_flash_attention():
            part.pop("attn_implementation")
            notes.append(
                tr(
                    "flash_attention_2 is not available here: attention is computed by torch, "
                    "with the same result."
                )
            )
    return notes


def has_flash_attention() -> bool:
    """Whether flash-attn 2 can be imported and there is a GPU for it."""
    if not has_gpu():
        return False
    try:
        # a build for another torch fails; flash-attn 4 alone has no such function
        return hasattr(importlib.import_module("flash_attn"), "flash_attn_varlen_func")
    except Exception:
        return False


def adapt_loops(config: Config) -> None:
    """Replace mmengine's loops by ours, in place, and complete what they need."""
    for split in ("val", "test"):
        if config.get(f"{split}_dataloader") is not None:
            if config.get(f"{split}_cfg") is None:
                config[f"{split}_cfg"] = {}
            if config.get(f"{split}_evaluator") is None:
                config[f"{split}_evaluator"] = []
    for key, loop in LOOPS.items():
        settings = config.get(key)
        if settings is None:
            continue
        by_epoch = settings.pop("by_epoch", None)
        kind = last_name(dict.get(settings, "type", ""))
        if kind in ("", last_name(loop), *MMENGINE_LOOPS):
            settings["type"] = loop
        if key == "train_cfg" and (kind == "EpochBasedTrainLoop" or (by_epoch and not kind)):
            settings.setdefault("val_interval", 1)  # mmengine's default
            settings["val_by_epoch"] = True


def _adapt_sequence_parallel(config: Config) -> list[str]:
    """Let the processes that share each row read the same rows."""
    strategy = config.get("strategy") or {}
    # v0.1 also took it from its DeepSpeed strategy.
    size = config.get("sequence_parallel_size", strategy.get("sequence_parallel_size", 1))
    if size == 1:
        return []
    config.sequence_parallel_size = size
    if config.get("framework", "mmengine").lower() == "huggingface":
        raise UserError(
            tr("transformers' Trainer cannot share rows between processes."),
            hint=tr("set sequence_parallel_size=1, or train with a config without framework."),
            where=Where(config.filename, key="sequence_parallel_size"),
        )
    sampler = (config.get("train_dataloader") or {}).get("sampler")
    if not isinstance(sampler, dict) or last_name(dict.get(sampler, "type")) != "DefaultSampler":
        return []
    sampler["type"] = SEQUENCE_PARALLEL_SAMPLER
    return [
        tr(
            "DefaultSampler would give the processes that share a row different ones: "
            "SequenceParallelSampler is used."
        )
    ]


def _adapt_hooks(config: Config) -> None:
    hooks = config.get("default_hooks")
    if hooks is None:
        config.default_hooks = hooks = ConfigDict()
    hooks.setdefault("checkpoint", dict(by_epoch=False, interval=-1))
    hook = hooks["checkpoint"]  # a copy of what was given
    if hook is not None and last_name(dict.get(hook, "type", "CheckpointHook")) == "CheckpointHook":
        hook["type"] = CHECKPOINT_HOOK
        if not hook.get("by_epoch", True):
            hook.setdefault("save_last", True)
    for each in [*dict.values(hooks), *(config.get("custom_hooks") or [])]:
        kind = dict.get(each, "type") if isinstance(each, dict) else None
        if last_name(kind) == "EarlyStoppingHook":
            each["type"] = EARLY_STOPPING_HOOK
        elif isinstance(kind, str) and kind in HOOKS:
            each["type"] = HOOKS[kind]


def _other_dtype(wanted: str, used: str, key: str) -> str:
    return tr(
        "{key}={wanted} does not run on this machine: {used} is used.",
        key=key,
        wanted=wanted,
        used=used,
    )
