"""What a run is trained with, as plain data: compared when it is resumed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.checkpoint.data_fingerprint import DataFingerprint, IndexedRows
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from xtuner.utils.types import Tokenizer

RESTART = "restart"
"""Allows to start from the beginning where no checkpoint is usable."""
KINDS = ("config", "data", "tokenizer", "packages", "world_size")
PACKAGES = ("xtuner", "torch", "transformers", "peft", "bitsandbytes", "deepspeed")

# The keys of a config that decide what is trained; all others only decide where, and what is shown.
TRAINED = (
    "model",
    "train_dataloader",
    "optim_wrapper",
    "param_scheduler",
    "train_cfg",
    "randomness",
    "strategy",
)
NOT_TRAINED = (
    "train_dataloader.num_workers",
    "train_dataloader.prefetch_factor",
    "train_dataloader.pin_memory",
    "train_dataloader.persistent_workers",
    "train_dataloader.dataset.map_num_proc",
    "train_cfg.val_interval",
    "train_cfg.val_begin",
)
# How long to train; with it the ends of the schedules move.
LENGTH = ("train_cfg.max_epochs", "train_cfg.max_iters")
SCHEDULE_ENDS = ("begin", "end", "T_max", "total_iters")


@dataclass(frozen=True)
class Change:
    """Something that is not as it was when the checkpoint was written."""

    kind: str
    text: str
    harmless: bool = False


def fingerprints(
    *,
    config: Mapping[str, Any],
    dataset: object = None,
    tokenizer: Tokenizer | None = None,
    world_size: int = 1,
    data_parallel_size: int | None = None,
) -> dict[str, Any]:
    """Note what a run is trained with, in a form that goes into a checkpoint.

    Args:
        config: the resolved config.
        dataset: the prepared training data; its rows are sampled evenly.
        tokenizer: a Hugging Face tokenizer.
        world_size: number of processes.
        data_parallel_size: how many of them read rows of their own; all when None.
    """
    noted: dict[str, Any] = {
        "config": flat_config(config),
        "packages": package_versions(),
        "world_size": world_size,
        "data_parallel_size": data_parallel_size or world_size,
    }
    if isinstance(dataset, IndexedRows):
        noted["data"] = asdict(DataFingerprint.of(dataset))
    if tokenizer is not None:
        noted["tokenizer"] = _tokenizer(tokenizer)
    return noted


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Compare two results of ``fingerprints``; what one of them lacks is not compared."""
    found = _config_changes(before.get("config", {}), now.get("config", {}))
    for name, old in before.get("packages", {}).items():
        new = now.get("packages", {}).get(name)
        if old != new:
            found.append(Change("packages", f"{name}: {old} -> {new or tr('missing')}"))
    found += _data_changes(before.get("data") or {}, now.get("data") or {})
    old_tokens, new_tokens = before.get("tokenizer"), now.get("tokenizer")
    if old_tokens and new_tokens and old_tokens != new_tokens:
        found.append(Change("tokenizer", tr("vocabulary or settings")))
    if before.get("world_size", now.get("world_size")) != now.get("world_size"):
        found.append(Change("world_size", f"{before['world_size']} -> {now['world_size']}"))
    else:  # as many processes, but not as many to a row
        old, new = (
            noted.get("data_parallel_size", noted.get("world_size")) for noted in (before, now)
        )
        if None not in (old, new) and old != new:
            label = tr("processes with rows of their own")
            found.append(Change("world_size", f"{label}: {old} -> {new}"))
    return found


def refuse_changes(
    found: Sequence[Change], allowed: Collection[str], checkpoint: str | Path
) -> list[str]:
    """Refuse to resume where something changed that was not allowed to.

    Args:
        found: from ``changes``.
        allowed: the words of ``--resume-allow``: kinds, or ``all``.
        checkpoint: for the message.

    Returns:
        One line for each change that is allowed, to be logged.

    Raises:
        UserError: listing all changes that are not allowed.
    """
    unknown = sorted(set(allowed) - {*KINDS, "all", RESTART})
    if unknown:
        raise UserError(
            tr("--resume-allow does not know {unknown}.", unknown=", ".join(unknown)),
            hint=f"--resume-allow {','.join(KINDS)}",
        )
    refused = [
        change
        for change in found
        if not change.harmless and change.kind not in allowed and "all" not in allowed
    ]
    if refused:
        listed = "\n".join(f"  {change.kind}: {change.text}" for change in refused)
        kinds = ",".join(sorted({change.kind for change in refused}))
        raise UserError(
            tr(
                "this is not the run that the checkpoint is from. Changed since:\n{listed}",
                listed=listed,
            ),
            hint=tr(
                "undo the change, or resume anyway with '--resume-allow {kinds}'.", kinds=kinds
            ),
            where=Where(str(checkpoint)),
        )
    return [
        tr("changed since the checkpoint: {kind}: {text}", kind=change.kind, text=change.text)
        for change in found
    ]


def flat_config(config: Mapping[str, Any]) -> dict[str, str]:
    """The part of a config that decides what is trained, as dotted key -> text of the value."""
    flat: dict[str, str] = {}
    for key in TRAINED:
        if config.get(key) is not None:
            _flatten(config[key], key, flat)
    return {key: value for key, value in flat.items() if key not in NOT_TRAINED}


def _flatten(value: object, key: str, flat: dict[str, str]) -> None:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            _flatten(item, f"{key}.{name}", flat)
    elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            _flatten(item, f"{key}.{number}", flat)
    else:
        flat[key] = _text(value)


def _text(value: object) -> str:
    """A value's text, the same in every process: functions and classes by their full name."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_text(item) for item in value) + "]"
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None)
    return f"{module}.{name}" if module and name else repr(value)


def _config_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[Change]:
    if not before or not now:
        return []
    absent = tr("(nothing)")
    longer = any(before.get(key) != now.get(key) for key in LENGTH)
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key, absent), now.get(key, absent)
        if old == new:
            continue
        ends = key.startswith("param_scheduler.") and key.rpartition(".")[2] in SCHEDULE_ENDS
        harmless = key in LENGTH or (longer and ends)
        found.append(Change("config", f"{key}: {old} -> {new}", harmless=harmless))
    return found


def _data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Rows added or taken away, or else rows with other values in any column."""
    if {"rows"} <= before.keys() & now.keys() and before["rows"] != now["rows"]:
        return [Change("data", f"{before['rows']} -> {now['rows']}")]
    if {"content"} <= before.keys() & now.keys() and before["content"] != now["content"]:
        return [Change("data", tr("rows have another content"))]
    return []


def package_versions() -> dict[str, str]:
    """The versions of the installed packages that the numbers of a training depend on."""
    return {name: version for name in PACKAGES if (version := _version(name))}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tokenizer(tokenizer: Tokenizer) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items())
    special = sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items())
    noted = json.dumps([vocabulary, special, str(tokenizer.chat_template)], ensure_ascii=False)
    return hashlib.sha256(noted.encode()).hexdigest()
