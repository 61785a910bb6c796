"""Going on with a run: which checkpoint, and whether what it was trained with is still the same."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, get_world_size, is_main_process

from xtuner.checkpoint.checkpoint import config_beside, find_latest, load_checkpoint
from xtuner.checkpoint.run_state import SCHEDULE_ENDS, bare, restore
from xtuner.parallel.sequence.groups import get_data_parallel_world_size
from xtuner.registry import BUILDER
from xtuner.utils.errors import UserError, Where
from xtuner.utils.files import write_text
from xtuner.utils.lang import tr

KINDS = ("config", "data", "tokenizer", "packages", "world_size")
PACKAGES = ("xtuner", "torch", "transformers", "peft", "bitsandbytes", "deepspeed")
SAMPLED_ROWS = 64
METRICS = "metrics.jsonl"

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


@dataclass(frozen=True)
class Change:
    """Something that is not as it was when the checkpoint was written."""

    kind: str
    text: str
    harmless: bool = False


def checkpoint_to_resume(work_dir: str | Path, resume: str | bool | Path) -> Path | None:
    """Choose the checkpoint to go on from.

    Args:
        work_dir: the folder of the run.
        resume: a path, or True for the newest good checkpoint of ``work_dir``; False for none.

    Returns:
        A file or folder, or None when there is nothing to resume (a fresh start, which is said).

    Raises:
        UserError: when the path that was asked for does not exist.
    """
    if not resume:
        return None
    if resume is not True:
        path = Path(resume)
        if path.is_dir() and not path.name.endswith(".pth"):
            return _newest(path, hint_dir=path)
        if not path.exists():
            raise UserError(
                tr("there is no such checkpoint."),
                hint=_there_is(path.parent),
                where=Where(str(path)),
            )
        return path
    found: list[Path | None] = [find_latest(work_dir) if is_main_process() else None]
    broadcast_object_list(found)
    if found[0] is None and is_main_process():
        print(tr("No checkpoint in {work_dir}: starting from the beginning.", work_dir=work_dir))
    return found[0]


def of_run(runner: Any) -> dict[str, Any]:
    """The fingerprints of a run whose data and model are built."""
    return fingerprints(
        config=runner.cfg,
        dataset=runner.train_dataloader.dataset,
        tokenizer=_tokenizer_of(runner),
        world_size=get_world_size(),
        data_parallel_size=get_data_parallel_world_size(),
    )


def resume_run(runner: Any, checkpoint: str | Path, allowed: Collection[str] = ()) -> None:
    """Put a run that is built where a checkpoint was taken, if it is still the same run.

    Args:
        runner: the runner; its ``fingerprints`` are those of ``of_run``.
        checkpoint: a good ``.pth`` file.
        allowed: what may have changed, see ``refuse_changes``.

    Raises:
        UserError: when the file is damaged, something changed, or the weights do not fit.
    """
    state = load_checkpoint(checkpoint)
    before = state["meta"].get("fingerprints", {})
    for line in refuse_changes(changes(before, runner.fingerprints), allowed, checkpoint):
        runner.logger.warning(line)
    restore(runner, state)
    done = runner.train_loop.iter
    if is_main_process():
        truncate_metrics(Path(runner.work_dir) / METRICS, state["meta"]["iter"])
        print(
            tr(
                "Going on from {checkpoint}: {done} of {max_iters} iterations are done.",
                checkpoint=checkpoint,
                done=done,
                max_iters=runner.max_iters,
            )
        )


def fingerprints(
    *,
    config: Mapping[str, Any],
    dataset: Any = None,
    tokenizer: Any = None,
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
        "packages": {name: v for name in PACKAGES if (v := _version(name))},
        "world_size": world_size,
        "data_parallel_size": data_parallel_size or world_size,
    }
    if dataset is not None and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        noted["data"] = {"rows": len(dataset), "sample": _sample(dataset)}
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
    old_data, new_data = before.get("data"), now.get("data")
    if old_data and new_data and old_data != new_data:
        rows = f"{old_data['rows']} -> {new_data['rows']}"
        same = tr("rows have another content")
        found.append(Change("data", rows if old_data["rows"] != new_data["rows"] else same))
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
            said = tr("processes with rows of their own")
            found.append(Change("world_size", f"{said}: {old} -> {new}"))
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
        One line for each change that is gone along with, to be logged.

    Raises:
        UserError: listing all changes that are not allowed.
    """
    unknown = sorted(set(allowed) - {*KINDS, "all"})
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
                "undo the change, or go on all the same with '--resume-allow {kinds}'.", kinds=kinds
            ),
            where=Where(str(checkpoint)),
        )
    return [
        tr("changed since the checkpoint: {kind}: {text}", kind=change.kind, text=change.text)
        for change in found
    ]


def truncate_metrics(metrics: Path, iterations: int) -> None:
    """Drop from ``metrics.jsonl`` what was logged after a checkpoint, as it will be logged again.

    Args:
        metrics: the file; nothing is done when it does not exist.
        iterations: micro-batches done at the checkpoint. A last line that is cut off goes too.
    """
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("iter", 0) <= iterations:
            kept.append(line + "\n")
    write_text(metrics, "".join(kept))


def resume_command(checkpoint: str | Path | None) -> str:
    """The command that continues a run which has been stopped."""
    if checkpoint is None:
        return tr("start the same command again.")
    config = config_beside(checkpoint) or "CONFIG"
    command = f"xtuner train {config} --work-dir {Path(checkpoint).parent} --resume"
    return tr("go on with: {command}", command=command)


def flat_config(config: Mapping[str, Any]) -> dict[str, str]:
    """The part of a config that decides what is trained, as dotted key -> text of the value."""
    flat: dict[str, str] = {}
    for key in TRAINED:
        if config.get(key) is not None:
            _flatten(config[key], key, flat)
    return {key: value for key, value in flat.items() if key not in NOT_TRAINED}


def _flatten(value: Any, key: str, flat: dict[str, str]) -> None:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            _flatten(item, f"{key}.{name}", flat)
    elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            _flatten(item, f"{key}.{number}", flat)
    else:
        flat[key] = _text(value)


def _text(value: Any) -> str:
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


def _newest(folder: Path, hint_dir: Path) -> Path:
    found = find_latest(folder)
    if found is None:
        raise UserError(
            tr("there is no good checkpoint in this folder."),
            hint=_there_is(hint_dir),
            where=Where(str(folder)),
        )
    return found


def _there_is(folder: Path) -> str:
    """What a user could have meant: the checkpoints that are in a folder."""
    names = sorted(entry.name for entry in folder.glob("*.pth")) if folder.is_dir() else []
    if names:
        return tr("in {folder} there are: {names}.", folder=folder, names=", ".join(names))
    return tr(
        "there are no checkpoints in {folder}; leave '--resume' out to start anew.", folder=folder
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sample(dataset: Any) -> str:
    """A checksum over evenly spread rows: which tokens are seen, and which are trained."""
    digest = hashlib.sha256()
    count = len(dataset)
    for number in range(min(SAMPLED_ROWS, count)):
        row = dataset[number * count // min(SAMPLED_ROWS, count)]
        for name in ("input_ids", "labels"):
            if isinstance(row, Mapping) and name in row:
                digest.update(repr(list(map(int, row[name]))).encode())
    return digest.hexdigest()


def _tokenizer_of(runner: Any) -> Any:
    """The tokenizer that the data was encoded with; None where the config names none."""
    built = getattr(bare(runner.model), "tokenizer", None)
    dataset = (runner.cfg.get("train_dataloader") or {}).get("dataset") or {}
    named = built or runner.cfg.get("tokenizer") or dataset.get("tokenizer")
    return BUILDER.build(named) if isinstance(named, Mapping) else named


def _tokenizer(tokenizer: Any) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items())
    special = sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items())
    noted = json.dumps([vocabulary, special, str(tokenizer.chat_template)], ensure_ascii=False)
    return hashlib.sha256(noted.encode()).hexdigest()
