"""Adapts a config to this machine: devices, number formats, what is installed. All of it is said.

After this the config is written out and never changed again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.config import Config, ConfigDict

from xtuner.config.adapt.validation import adapt_validation_split
from xtuner.config.compat import adapt_published
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

HALVES = {"float16": "bfloat16", "bfloat16": "float16"}
# Optimizers of torch that have a fused form, on a CPU as on a GPU.
FUSED = ("Adam", "AdamW")
OUR_LOOPS = {"train_cfg": "TrainLoop", "val_cfg": "ValLoop", "test_cfg": "TestLoop"}


def adapt(cfg: Config, *, launcher: str = "none") -> list[str]:
    """Change a config in place so that it runs here.

    Args:
        cfg: a loaded config.
        launcher: who started the processes; with ``none`` there is one.

    Returns:
        One line for each change that people should know of.
    """
    said = adapt_published(cfg)
    gpu = torch.cuda.is_available()
    _adapt_model(cfg, said, gpu)
    _adapt_optimizer(cfg, said, gpu)
    _adapt_shared_rows(cfg, said)
    adapt_validation_split(cfg, said)
    adapt_loops(cfg)
    _adapt_hooks(cfg)
    backend = cfg.get("env_cfg", {}).get("dist_cfg", {}).get("backend")
    if backend == "nccl" and not gpu:
        cfg.env_cfg.dist_cfg.backend = "gloo"
        if launcher != "none":
            said.append(tr("nccl needs GPUs, and there are none: gloo is used."))
    return said


def supported(dtype: str) -> str:
    """The number format to use in place of ``dtype`` on this machine: itself, where it runs.

    Args:
        dtype: ``float16``, ``bfloat16`` or ``float32``.
    """
    if dtype not in HALVES:
        return dtype
    if torch.cuda.is_available():
        return dtype if dtype == "float16" or torch.cuda.is_bf16_supported() else "float16"
    return "bfloat16" if _cpu_has_bf16() else "float32"


def name_of(value: Any) -> str:
    """The bare name of a class or function in a config: real, lazy, or given by its name."""
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) else str(value).rpartition(".")[2].strip("'\">")


def _cpu_has_bf16() -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("architecture") != "x86_64":
        return True
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _adapt_optimizer(cfg: Config, said: list[str], gpu: bool) -> None:
    from xtuner.engine.optim import FinetuneOptimWrapper

    wrapper = cfg.get("optim_wrapper")
    if not wrapper or "optimizer" not in wrapper or "constructor" in wrapper:
        return
    kind = name_of(wrapper.get("type", "OptimWrapper"))
    if kind not in ("AmpOptimWrapper", "OptimWrapper", "FinetuneOptimWrapper"):
        return
    wrapper.type = FinetuneOptimWrapper
    wrapper.device = "cuda" if gpu else "cpu"
    if kind == "AmpOptimWrapper":
        wrapper.setdefault("dtype", "float16")
        wrapper.pop("use_fsdp", None)
    wanted = wrapper.get("dtype")
    if wanted is not None:
        wrapper.dtype = supported(_dtype_name(wanted))
        if wrapper.dtype != _dtype_name(wanted):
            said.append(_other_dtype(_dtype_name(wanted), wrapper.dtype, "optim_wrapper.dtype"))
    optimizer = wrapper.optimizer
    kind = optimizer.type
    is_torch = isinstance(kind, str) or str(getattr(kind, "__module__", "")).startswith("torch.")
    chosen = {"fused", "foreach", "capturable", "differentiable"} & set(optimizer)
    if is_torch and name_of(kind) in FUSED and not chosen:
        optimizer.fused = True


def _adapt_model(cfg: Config, said: list[str], gpu: bool) -> None:
    for path, part in _dicts(cfg.get("model"), "model"):
        for key in ("dtype", "bnb_4bit_compute_dtype"):
            value = part.get(key)
            name = _dtype_name(value)
            if name in HALVES and supported(name) != name:
                _replace_dtype(part, key, value, supported(name))
                said.append(_other_dtype(name, supported(name), f"{path}.{key}"))
        wanted = part.get("attn_implementation")
        if wanted == "flash_attention_2" and not _has_flash_attention(gpu):
            part.pop("attn_implementation")
            said.append(
                tr(
                    "flash_attention_2 is not available here: attention is computed by torch, "
                    "with the same result."
                )
            )


def _replace_dtype(part: ConfigDict, key: str, value: Any, name: str) -> None:
    part[key] = name if isinstance(value, str) else getattr(torch, name)


def _has_flash_attention(gpu: bool) -> bool:
    return gpu and importlib.util.find_spec("flash_attn") is not None


def adapt_loops(cfg: Config) -> None:
    """Put our loops in the place of mmengine's, and complete what they need."""
    from xtuner.engine.runner import loops, val_loop

    ours = {
        "train_cfg": loops.TrainLoop,
        "val_cfg": val_loop.ValLoop,
        "test_cfg": val_loop.TestLoop,
    }
    for split in ("val", "test"):
        if cfg.get(f"{split}_dataloader") is not None:
            if cfg.get(f"{split}_cfg") is None:
                cfg[f"{split}_cfg"] = {}
            if cfg.get(f"{split}_evaluator") is None:
                cfg[f"{split}_evaluator"] = []
    for key, loop in ours.items():
        settings = cfg.get(key)
        if settings is None:
            continue
        by_epoch = settings.pop("by_epoch", None)
        known = {OUR_LOOPS[key], "EpochBasedTrainLoop", "IterBasedTrainLoop"}
        if "type" not in settings or name_of(settings.type) in known:
            settings["type"] = loop
        if by_epoch and "val_interval" in settings:
            settings.pop("val_interval")  # it counted epochs; ours counts micro-batches


def _adapt_shared_rows(cfg: Config, said: list[str]) -> None:
    """Where several processes share each row, let them read the same rows."""
    strategy = cfg.get("strategy") or {}
    # v0.1 also took it from its DeepSpeed strategy.
    size = cfg.get("sequence_parallel_size", strategy.get("sequence_parallel_size", 1))
    if size == 1:
        return
    cfg.sequence_parallel_size = size
    if cfg.get("framework", "mmengine").lower() == "huggingface":
        raise UserError(
            tr("transformers' Trainer cannot share rows between processes."),
            hint=tr("set sequence_parallel_size=1, or train with a config without framework."),
            where=Where(cfg.filename, key="sequence_parallel_size"),
        )
    sampler = (cfg.get("train_dataloader") or {}).get("sampler")
    if isinstance(sampler, dict) and name_of(sampler.get("type")) == "DefaultSampler":
        from xtuner.parallel.sequence import SequenceParallelSampler

        sampler["type"] = SequenceParallelSampler
        said.append(
            tr(
                "DefaultSampler would give the processes that share a row different ones: "
                "SequenceParallelSampler is used."
            )
        )


def _adapt_hooks(cfg: Config) -> None:
    from xtuner.engine.hooks.checkpoint_hook import CheckpointHook
    from xtuner.engine.hooks.early_stopping_hook import EarlyStoppingHook

    hooks = cfg.get("default_hooks")
    if hooks is None:
        cfg.default_hooks = hooks = ConfigDict()
    hooks.setdefault("checkpoint", dict(by_epoch=False, interval=-1))
    hook = hooks["checkpoint"]  # a copy of what was given
    if hook is not None and name_of(hook.get("type", "CheckpointHook")) == "CheckpointHook":
        hook["type"] = CheckpointHook
        if not hook.get("by_epoch", True):
            hook.setdefault("save_last", True)
    for each in [*hooks.values(), *(cfg.get("custom_hooks") or [])]:
        if isinstance(each, dict) and name_of(each.get("type")) == "EarlyStoppingHook":
            each["type"] = EarlyStoppingHook


def _dicts(value: Any, path: str) -> Iterator[tuple[str, ConfigDict]]:
    """All dicts of a nested setting, each with its dotted path."""
    if isinstance(value, dict):
        yield path, value
        for key in list(value):
            yield from _dicts(value[key], f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _dicts(item, f"{path}.{number}")


def _dtype_name(value: Any) -> str:
    """``float16`` for ``torch.float16``, ``'torch.float16'``, ``'fp16'`` and ``'float16'``."""
    short = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}
    name = str(value).removeprefix("torch.")
    return short.get(name, name)


def _other_dtype(wanted: str, used: str, key: str) -> str:
    return tr(
        "{key}={wanted} does not run on this machine: {used} is used.",
        key=key,
        wanted=wanted,
        used=used,
    )
