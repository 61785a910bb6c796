"""A user's config made small enough to try on a CPU: its model, rows, lengths and steps.

Each function changes the values of a loaded config in place and gives a line for each change, so
that what differs from the real run is told. Everything else stays the user's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import ConfigDict
from mmengine.config.lazy import LazyObject

from xtuner.config.adapt.engine_types import CHECKPOINT_HOOK
from xtuner.config.document import ConfigDocument
from xtuner.config.values import dotted_name, is_number, iter_dicts, last_name
from xtuner.dataset.prepare.rows import load_usable_rows
from xtuner.model.meta_model import is_model_loader
from xtuner.model.remote_code import resolve_trust
from xtuner.proving.shrink import Owner, ShrunkModel, write_shrunk
from xtuner.registry import BUILDER
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

SAMPLE_ROWS = LazyObject("xtuner.proving.rows", "sample_rows")
ADAMW = LazyObject("torch.optim", "AdamW")
SAMPLED_BY = ("process_hf_dataset", "build_preference_dataset")
"""Builders whose ``dataset`` gives rows of a table."""
LIMITED_BY = (
    *("process_ms_dataset", "VisionLanguageDataset", "VisionLanguagePreferenceDataset"),
    *("LLaVADataset", "InternVL_V1_5_Dataset"),
)
"""Builders that draw rows themselves (``max_dataset_length``)."""
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
PATH = "pretrained_model_name_or_path"
_INTERVALS = ("interval", "every_n_iters", "save_interval")


@dataclass(frozen=True)
class Limits:
    """Sizes of a small run.

    Attributes:
        rows: of each dataset.
        tokens: of a sequence.
        batch_size: rows of a micro-batch.
        accumulative_counts: micro-batches of an optimizer step.
        steps: optimizer steps.
        new_tokens: of a generated answer.
    """

    rows: int = 16
    tokens: int = 512
    batch_size: int = 2
    accumulative_counts: int = 2
    steps: int = 4
    new_tokens: int = 8


def shrink_models(
    values: dict[str, Any], file: str, folder: Path, *, noise: bool = True
) -> list[ShrunkModel]:
    """Write small models in place of those that a config loads, and name them in it.

    Args:
        values: of the config; changed in place.
        file: of the config, for messages.
        folder: gets a folder for each model.
        noise: keep the models' own dropout.

    Returns:
        The models; the language model first.

    Raises:
        UserError: when a model's ``config.json`` is not here, or its class cannot be made.
    """
    model = dict.get(values, "model")
    if not isinstance(model, dict):
        raise UserError(tr("the config has no model."), where=Where(file, key="model"))
    made: dict[str, ShrunkModel] = {}
    for key, owner in owners(model):
        if owner.path not in made:
            target = folder / (Path(owner.path).name or "model")
            made[owner.path] = _written(owner, target, Where(file, key=f"model.{key}"), noise)
    for _, part in iter_dicts(values):
        for name, value in list(dict.items(part)):
            if isinstance(value, str) and value in made:
                dict.__setitem__(part, name, str(made[value].folder))
    return list(made.values())


def owners(model: Mapping[str, Any]) -> Iterator[tuple[str, Owner]]:
    """What a config's ``model`` loads with ``from_pretrained``, each with its dotted key."""
    for key, part in iter_dicts(ConfigDict(model)):
        loader, path = part.get("type"), part.get(PATH)
        if is_model_loader(loader) and path:
            owner: Any = getattr(loader, "__self__", None)
            trusted = resolve_trust(owner, str(path), trusted=bool(part.get("trust_remote_code")))
            yield key, Owner(owner, str(path), trusted)


def _written(owner: Owner, folder: Path, where: Where, noise: bool) -> ShrunkModel:
    try:
        return write_shrunk(owner, folder, noise=noise)
    except UserError:
        raise
    except Exception as error:  # of the class, which we do not know
        first = next(iter(str(error).splitlines()), "")
        raise UserError(
            tr(
                "no small model of this class can be made: {kind}: {error}",
                kind=type(error).__name__,
                error=first,
            ),
            hint=tr("a newer transformers may know it; 'xtuner prove --full' takes it as it is."),
            where=where,
        ) from error


def needs_checkpoint_hook() -> str:
    """What to do where a run saves nothing."""
    setting = "default_hooks.checkpoint = dict(type=CheckpointHook, interval=...)"
    return tr("the config needs {setting}", setting=setting)


def use_float32(values: dict[str, Any]) -> list[str]:
    """Compute in float32, where the differences that are looked for show."""
    for _, part in iter_dicts(values.get("model")):
        for name in ("dtype", "torch_dtype", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
            if name in part and part[name] is not None:
                dict.__setitem__(part, name, "float32")
        if _name(part) in ("from_pretrained", "_from_config") and PATH in part:
            part.pop("torch_dtype", None)
            part["dtype"] = "float32"
    wrapper = values.get("optim_wrapper")
    if isinstance(wrapper, dict) and "dtype" in wrapper:
        wrapper["dtype"] = "float32"
    return [tr("float32 on the CPU")]


def sample_data(values: dict[str, Any], rows: int) -> list[str]:
    """Take a few rows of each dataset, the longest one among them."""
    for key in LOADERS:
        for _, part in iter_dicts(dict.get(values, key)):
            _sample(part, rows)
    if is_number(values.get("val_size")) and values["val_size"]:
        values["val_size"] = max(1, rows // 4)
    return [tr("{rows} rows of each dataset, the longest among them", rows=rows)]


def _sample(part: dict[str, Any], rows: int) -> None:
    builder, source = _name(part), dict.get(part, "dataset")
    if builder in SAMPLED_BY and source is not None and _name(source) != "sample_rows":
        sampled = {"type": SAMPLE_ROWS, "dataset": source, "count": rows}
        sampled |= {key: part[key] for key in ("split", "bad_rows") if dict.get(part, key)}
        part["dataset"] = sampled
        if part.get("val_size"):
            part["val_size"] = max(1, rows // 4)
    elif builder in LIMITED_BY:
        part["max_dataset_length"] = min(rows, part.get("max_dataset_length") or rows)


def rows_in_all(values: dict[str, Any]) -> int | None:
    """How many rows a config's training tables have; None where another builder reads them."""
    loader = dict.get(values, "train_dataloader") or {}
    tables = [
        part
        for _, part in iter_dicts(loader)
        if _name(part) in SAMPLED_BY and dict.get(part, "dataset") is not None
    ]
    if not tables:
        return None
    return sum(map(_rows_of, tables))


def _rows_of(table: Mapping[str, Any]) -> int:
    split, policy = table.get("split") or "train", table.get("bad_rows") or "error"
    rows = len(load_usable_rows(table["dataset"], split, policy)[0])
    return min(rows, table.get("max_dataset_length") or rows)


def shorten(values: dict[str, Any], tokens: int) -> list[str]:
    """Cut sequences to so many tokens at most."""
    longest = 0
    for key in LOADERS:
        for _, part in iter_dicts(dict.get(values, key)):
            for name, factor in (("max_length", 1), ("max_packed_length", 2)):
                value = dict.get(part, name)
                if is_number(value):
                    longest = max(longest, int(value))
                    part[name] = min(int(value), factor * tokens)
    if longest <= tokens:
        return []
    return [tr("{tokens} tokens of {longest}", tokens=tokens, longest=longest)]


def run_alone(values: dict[str, Any]) -> list[str]:
    """Take out what needs a GPU, several processes, the network or files of the real size."""
    changes = []
    if dict.get(values, "strategy") is not None:
        changes.append(tr("without DeepSpeed and FSDP"))
        values["strategy"] = None
    if (values.get("sequence_parallel_size") or 1) != 1:
        changes.append("sequence_parallel_size=1")
        values["sequence_parallel_size"] = 1
    if values.get("visualizer") is not None:
        changes.append("visualizer=None")
        values["visualizer"] = None
    if values.get("load_from") is not None:
        changes.append(tr("not from load_from, whose weights have the real size"))
    values |= {"load_from": None, "resume": False}
    changes += _plain_optimizer(values.get("optim_wrapper"))
    values["env_cfg"] = {**(dict.get(values, "env_cfg") or {}), "dist_cfg": {"backend": "gloo"}}
    for _, part in iter_dicts(values.get("model")):
        if dict.get(part, "pretrained_pth") is not None:
            part["pretrained_pth"] = None
            changes.append("pretrained_pth=None")
        if dict.get(part, "peft_model") is not None:
            raise UserError(
                tr("an adapter that is continued has the real size."),
                hint=tr("take peft_model out and give lora; or use --full."),
                where=Where(key="model.peft_model"),
            )
    return changes


def _plain_optimizer(wrapper: object) -> list[str]:
    """An optimizer of torch, where another one computes on GPUs only."""
    optimizer = dict.get(wrapper, "optimizer") if isinstance(wrapper, dict) else None
    if not isinstance(wrapper, dict) or not isinstance(optimizer, dict):
        return []
    named = dotted_name(optimizer.get("type")) if "type" in optimizer else None
    if named is None or named[0].partition(".")[0] not in ("bitsandbytes", "deepspeed", "apex"):
        return []
    kept = {key: optimizer[key] for key in ("lr", "betas", "weight_decay") if key in optimizer}
    dict.__setitem__(wrapper, "optimizer", {"type": ADAMW, **kept})
    return [tr("AdamW in place of {name}", name=named[1])]


def few_steps(values: dict[str, Any], limits: Limits) -> list[str]:
    """Train a few steps; save, validate and evaluate after half of them."""
    changes = _small_batches(values, limits)
    wrapper = values.get("optim_wrapper")
    counts = _number(wrapper, "accumulative_counts") if isinstance(wrapper, dict) else 1
    half = max(1, limits.steps // 2) * counts
    loop = {key: value for key, value in values["train_cfg"].items() if key != "max_epochs"}
    values["train_cfg"] = {**loop, "max_iters": limits.steps * counts, "val_interval": half}
    if "default_hooks" not in values:
        values["default_hooks"] = {}
    hooks = dict.get(values, "default_hooks")
    if isinstance(hooks, dict) and "checkpoint" not in hooks:  # our default saves at the end
        hooks["checkpoint"] = {"type": CHECKPOINT_HOOK}
    for _, part in iter_dicts(
        {name: values.get(name) for name in ("default_hooks", "custom_hooks")}
    ):
        name = _name(part)
        for key in _INTERVALS:
            if is_number(part.get(key)) and part[key] > 0:
                part[key] = 1 if name == "LoggerHook" else half
        if name == "CheckpointHook":
            part |= {"interval": half, "by_epoch": False, "max_keep_ckpts": -1}
        if part.get("out_dir") is not None:  # nothing goes to the user's folders
            part.pop("out_dir")
        if name == "EvaluateChatHook":
            part["max_new_tokens"] = min(limits.new_tokens, part.get("max_new_tokens", 600))
    return [*changes, tr("{steps} optimizer steps", steps=limits.steps)]


def _small_batches(values: dict[str, Any], limits: Limits) -> list[str]:
    changes = []
    for key in LOADERS:
        loader = values.get(key)
        if not isinstance(loader, dict):
            continue
        batch = _number(loader, "batch_size")
        if batch > limits.batch_size:
            loader["batch_size"] = limits.batch_size
            changes.append(f"{key}.batch_size={limits.batch_size}")
        if _number(loader, "num_workers", 0) > 1:
            loader["num_workers"] = 1
    wrapper = values.get("optim_wrapper")
    if isinstance(wrapper, dict):
        counts = _number(wrapper, "accumulative_counts")
        if counts > limits.accumulative_counts:
            wrapper["accumulative_counts"] = limits.accumulative_counts
            changes.append(f"accumulative_counts={limits.accumulative_counts}")
    return changes


def _number(section: Mapping[str, Any], key: str, default: int = 1) -> int:
    value = section.get(key, default)
    return int(value) if is_number(value) else default


def _name(part: object) -> str:
    """The last name of a section's ``type``; imported names stay lazy."""
    kind = dict.get(part, "type") if isinstance(part, dict) else None
    return last_name(kind) if kind is not None else ""


def trusts_code(values: Mapping[str, Any]) -> bool:
    """Whether a config lets code of a model's folder run."""
    parts = (part for _, part in iter_dicts(ConfigDict(values)))
    return any(dict.get(part, "trust_remote_code") for part in parts)


def tokenizer_of(values: Mapping[str, Any]) -> Any:
    """The config's tokenizer, built; None where it names none."""
    section = values.get("tokenizer")
    return BUILDER.build(ConfigDict(section)) if isinstance(section, dict) else None


def require_runner(document: ConfigDocument, command: str) -> None:
    """Refuse configs whose training is not ours.

    Raises:
        UserError: for a config of transformers' Trainer, or without a training loop.
    """
    values = document.values
    if str(values.get("framework", "")).lower() == "huggingface":
        raise UserError(
            tr("{command} does not know configs of transformers' Trainer.", command=command),
            where=Where(document.file, key="framework"),
        )
    missing = [key for key in ("model", "train_dataloader", "train_cfg") if not values.get(key)]
    if missing:
        raise UserError(
            tr("the config has no {keys}.", keys=", ".join(missing)), where=Where(document.file)
        )


def lines_of(changes: Sequence[str]) -> list[str]:
    """Changes without repetitions, in their order."""
    return list(dict.fromkeys(changes))
