"""What a plan needs of a config: sizes of batches, the length of a run, the optimizer, sharding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config

from xtuner.config.adapt.machine import FORMS, FUSED
from xtuner.config.values import is_number, iter_dicts, last_name, own_values
from xtuner.model.activation_checkpointing import Checkpointing
from xtuner.utils.dtypes import dtype_name

PREFERENCE_MODELS = (
    *("DPO", "VisionLanguageDPO", "ORPO", "VisionLanguageORPO"),
    *("RewardModel", "VisionLanguageRewardModel"),
)
"""Model classes whose samples are two sequences: chosen and rejected."""
LENGTHS = ("max_packed_length", "max_length")
DEFAULT_LENGTH = 2048
"""Tokens of a row where the config does not bound them (``process_hf_dataset``'s default)."""


@dataclass(frozen=True)
class Sharding:
    """How the state of a model is distributed.

    Attributes:
        name: ``single``, ``ddp``, ``zero1``, ``zero2``, ``zero3`` or ``fsdp``.
        ranks: how many processes, one for each GPU.
        offload: whether shards and the optimizer (of ZeRO: what its file says) are in main memory.
    """

    name: str = "single"
    ranks: int = 1
    offload_optimizer: bool = False
    offload_weights: bool = False

    @property
    def is_deepspeed(self) -> bool:
        return self.name.startswith("zero")

    def of(self, size: float, *, from_stage: int) -> float:
        """Bytes of a rank, of ``size`` bytes that are sharded from a ZeRO stage on (FSDP: 3)."""
        stage = 3 if self.name == "fsdp" else int(self.name[-1]) if self.is_deepspeed else 0
        return size / self.ranks if stage >= from_stage else size


@dataclass(frozen=True)
class RunSettings:
    """The part of a config that decides what a run needs.

    Attributes:
        batch_size: rows of a micro-batch.
        sequences: of a row: 2 for preference pairs.
        length: the most tokens of a sequence (of a row, where rows are packed).
        accumulative_counts: micro-batches of an optimizer step.
        epochs: of the run, or None.
        iters: micro-batches of the run, or None.
        optimizer: name of its class.
        fused: whether its step needs no memory beside weights, gradients and state.
        dtype: of autocast; ``float32`` for none.
        checkpointing: which layers are recomputed in the backward pass; None for none.
        save_interval: micro-batches between two checkpoints; None for one at the end.
        kept: how many checkpoints are kept; None for all.
        sharding: how the model is distributed.
        sequence_parallel: how many processes share a row.
    """

    batch_size: int
    sequences: int
    length: int
    accumulative_counts: int
    epochs: float | None
    iters: int | None
    optimizer: str
    dtype: str
    checkpointing: Checkpointing | None
    save_interval: int | None
    kept: int | None
    sharding: Sharding
    sequence_parallel: int = 1
    fused: bool = True

    @property
    def tokens(self) -> int:
        """The most tokens of a micro-batch."""
        return self.batch_size * self.sequences * self.length

    @property
    def tokens_of_gpu(self) -> int:
        """Those of them that one GPU computes."""
        return -(-self.tokens // self.sequence_parallel)

    @property
    def replicas(self) -> int:
        """How many micro-batches are computed at a time."""
        return max(1, self.sharding.ranks // self.sequence_parallel)


def read_settings(config: Config, ranks: int) -> RunSettings:
    """Read the settings of a config, its strategy adapted.

    Args:
        config: a checked config; imported names may be lazy.
        ranks: how many processes train.
    """
    values = own_values(config)
    model, loader = _dict(values, "model"), _dict(values, "train_dataloader")
    wrapper, loop = _dict(values, "optim_wrapper"), _dict(values, "train_cfg")
    optimizer = _dict(wrapper, "optimizer")
    kind = last_name(dict.get(model, "type", ""))
    amp = last_name(dict.get(wrapper, "type", "")) == "AmpOptimWrapper"
    dtype = dict.get(wrapper, "dtype") or ("float16" if amp else "float32")
    hook = _dict(_dict(values, "default_hooks"), "checkpoint")
    interval = dict.get(hook, "interval", -1)
    keep = dict.get(hook, "max_keep_ckpts", -1)
    return RunSettings(
        batch_size=int(dict.get(loader, "batch_size") or 1),
        sequences=2 if kind in PREFERENCE_MODELS else 1,
        length=_length(loader),
        accumulative_counts=int(dict.get(wrapper, "accumulative_counts") or 1),
        epochs=_number(dict.get(loop, "max_epochs")),
        iters=_whole(dict.get(loop, "max_iters")),
        optimizer=last_name(dict.get(optimizer, "type", "AdamW")),
        fused=_is_fused(optimizer),
        dtype=dtype_name(dtype),
        checkpointing=Checkpointing.of(dict.get(model, "use_activation_checkpointing", True)),
        save_interval=interval if isinstance(interval, int) and interval > 0 else None,
        kept=keep if isinstance(keep, int) and keep > 0 else None,
        sharding=_sharding(_dict(values, "strategy"), ranks),
        sequence_parallel=_sequence_parallel(values),
    )


def _is_fused(optimizer: dict[str, Any]) -> bool:
    """Whether no weights are copied: as ``adapt_to_machine`` and torch have it on a GPU.

    Optimizers that are not torch's are taken to need no more.
    """
    name = last_name(dict.get(optimizer, "type", "AdamW"))
    if not hasattr(torch.optim, name):
        return True
    if dict.get(optimizer, "fused") or dict.get(optimizer, "foreach") is False:
        return True
    return name in FUSED and not FORMS & set(optimizer)


def _sequence_parallel(values: Mapping[str, object]) -> int:
    """Of the config, or of its strategy, where v0.1 had it."""
    for part in (values, _dict(values, "strategy")):
        size = dict.get(part, "sequence_parallel_size") if isinstance(part, dict) else None
        if isinstance(size, int) and size > 1:
            return size
    return 1


def _dict(values: Mapping[str, object], key: str) -> dict[str, Any]:
    value = dict.get(values, key) if isinstance(values, dict) else None
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    return float(value) if is_number(value) else None


def _whole(value: object) -> int | None:
    return int(value) if is_number(value) else None


def _length(loader: Mapping[str, object]) -> int:
    """The longest of what the datasets allow."""
    for key in LENGTHS:
        found = [
            int(part[key])
            for _, part in iter_dicts(loader)
            if is_number(dict.get(part, key)) and part[key] > 0
        ]
        if found:
            return max(found)
    return DEFAULT_LENGTH


def _sharding(strategy: Mapping[str, object], ranks: int) -> Sharding:
    kind = last_name(dict.get(strategy, "type", "")) if isinstance(strategy, dict) else ""
    if kind == "FSDPStrategy":
        offload = bool(strategy.get("cpu_offload"))
        return Sharding("fsdp", ranks, offload_optimizer=offload, offload_weights=offload)
    if kind == "DeepSpeedStrategy":
        settings = strategy.get("config")
        zero = _dict(settings, "zero_optimization") if isinstance(settings, dict) else {}
        return Sharding(
            f"zero{int(zero.get('stage', 0))}",
            ranks,
            offload_optimizer=_offloads(zero, "offload_optimizer"),
            offload_weights=_offloads(zero, "offload_param"),
        )
    return Sharding("ddp" if ranks > 1 else "single", ranks)


def _offloads(zero: Mapping[str, object], key: str) -> bool:
    target = zero.get(key)
    return isinstance(target, Mapping) and target.get("device", "none") != "none"
