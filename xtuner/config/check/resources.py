"""XT0342 to XT0344: steps, disk and tokens that a run needs and that are known before it."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xtuner.config.check.code import WARNING
from xtuner.config.check.data_files import loader_paths
from xtuner.config.check.problem import Context, Finding, rule
from xtuner.config.check.training import base_path
from xtuner.config.values import is_number, name_of
from xtuner.utils.data_files import SUFFIXES_OF
from xtuner.utils.few_steps import few_steps_advice_of
from xtuner.utils.hub import model_file
from xtuner.utils.lang import N_, tr

GIB = 2**30
LARGEST_COUNTED = 16 * 2**20
"""Bytes of data whose rows are counted; a run on more has steps enough."""
TEMPLATE_TOKENS = 64
"""Tokens of a row's chat template, about."""
ADAM_STATES = 2
"""Values that Adam keeps for each parameter, as large as the parameter itself."""


@rule(
    "XT0342",
    WARNING,
    N_("few optimizer steps"),
    N_(
        "A run of fewer than 20 optimizer steps hardly changes the model. Rows of small local "
        "files are counted; packed rows are at most their bytes divided by max_length, so there "
        "may be fewer steps: 'xtuner check-custom-dataset' counts the packs."
    ),
    wrong="train_cfg = dict(type=TrainLoop, max_iters=16)\n"
    "optim_wrapper = dict(accumulative_counts=16)",
    right="train_cfg = dict(type=TrainLoop, max_iters=320)\n"
    "optim_wrapper = dict(accumulative_counts=16)",
)
def few_optimizer_steps(context: Context) -> Iterator[Finding]:
    """Also said by the doctor and by the run's plan, by the same ``few_steps_advice``."""
    by_iterations = context.get("train_cfg.max_iters") is not None
    if by_iterations and context.get("train_cfg.max_epochs") is not None:
        return  # XT0319
    rows = 0 if by_iterations else most_rows(context)
    if rows is None:
        return
    keys = ("train_dataloader", "optim_wrapper", "train_cfg")
    sections = {key: context.get(key) for key in keys if isinstance(context.get(key), dict)}
    settings = {key: {name: dict.get(value, name) for name in _NUMBERS if name in value}
                for key, value in sections.items()}  # fmt: skip
    advice = few_steps_advice_of(rows, settings, counted="at most")
    if advice is not None:
        yield Finding(f"train_cfg.{'max_iters' if by_iterations else 'max_epochs'}", advice)


_OF_ROWS = ("max_dataset_length", "val_size")
_NUMBERS = ("batch_size", "accumulative_counts", "max_epochs", "max_iters")


def most_rows(context: Context) -> int | None:
    """The most rows that the training data can have, packed where they are packed.

    Returns:
        None where that cannot be told from small local files.
    """
    total = 0
    parts = [key for key in context.typed("process_hf_dataset") if "train_" in key]
    outside = [key for key in context.typed("load_dataset") if key.startswith("train_dataloader")]
    if not parts or len(outside) != len(parts):
        return None  # a part that is read in another way
    for key in parts:
        counted = _rows_of_loader(context, f"{key}.dataset")
        if counted is None:
            return None
        rows, size = counted
        limit, held_out = (context.get(f"{key}.{name}") for name in _OF_ROWS)
        rows = min(rows, int(limit)) if is_number(limit) else rows
        if is_number(held_out) and held_out > 0:
            rows -= int(held_out) if held_out >= 1 else max(1, round(rows * held_out))
        length = context.get(f"{key}.max_length")
        if context.get(f"{key}.pack_to_max_length", True) and is_number(length) and length > 0:
            rows = math.ceil((size + rows * TEMPLATE_TOKENS) / length)
        total += rows
    return total or None


def _rows_of_loader(context: Context, key: str) -> tuple[int, int] | None:
    """The most rows of a ``load_dataset`` of local files, and their bytes."""
    if context.get(f"{key}.path") not in SUFFIXES_OF or context.get(f"{key}.data_dir"):
        return None
    files = context.get(f"{key}.data_files")
    if isinstance(files, dict) and set(dict.keys(files)) != {"train"}:
        return None
    rows = size = 0
    for named in loader_paths(context, key):
        file = Path(named.path).expanduser()
        if not file.is_file() or size + file.stat().st_size > LARGEST_COUNTED:
            return None
        counted = _rows_of_file(file, context.get(f"{key}.field"))
        if counted is None:
            return None
        rows, size = rows + counted, size + file.stat().st_size
    return rows, size


def _rows_of_file(file: Path, field: str | None) -> int | None:
    """The most rows of a text file: its lines, or the items of a JSON array."""
    try:
        if file.suffix not in (".json", ".jsonl"):
            with file.open(encoding="utf-8", newline="") as stream:
                return sum(1 for _ in csv.reader(stream)) if file.suffix == ".csv" else None
        text = file.read_text("utf-8-sig")
        if text.lstrip().startswith("[") or field:
            content = json.loads(text)
            return len(content[field] if field else content)
        return sum(1 for line in text.split("\n") if line.strip())
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return None  # the data doctor says what is wrong with it


@rule(
    "XT0343",
    WARNING,
    N_("too little disk for the checkpoints"),
    N_(
        "A checkpoint of full training holds the weights and the two moments of Adam, 12 bytes a "
        "parameter in float32; one of LoRA only those of the adapter. While one is written, "
        "max_keep_ckpts others exist. save_optimizer=False keeps the weights alone."
    ),
    wrong="model = dict(llm=dict(pretrained_model_name_or_path='./model'), lora=dict(r=64))\n"
    "default_hooks = dict(checkpoint=dict(interval=100, max_keep_ckpts=5))",
    right="model = dict(llm=dict(pretrained_model_name_or_path='./model'), lora=dict(r=64))\n"
    "default_hooks = dict(checkpoint=dict(interval=100, max_keep_ckpts=1))",
)
def little_disk(context: Context) -> Iterator[Finding]:
    key = "default_hooks.checkpoint"
    size = checkpoint_bytes(context)
    if size is None or not isinstance(context.get(key), dict):
        return
    count = planned_checkpoints(context)
    free = free_bytes(context.get("work_dir"))
    if size * count > free:
        yield Finding(
            f"{key}.max_keep_ckpts",
            tr(
                "{count} checkpoint(s) of about {size:.1f} GiB need {need:.1f} GiB; {free:.1f} "
                "GiB are free",
                count=count,
                size=size / GIB,
                need=size * count / GIB,
                free=free / GIB,
            ),
            tr("make room, choose another work dir, or set max_keep_ckpts lower."),
        )


def free_bytes(work_dir: object) -> int:
    """Free space where the work dir is, or will be."""
    place = Path(work_dir if isinstance(work_dir, str) else "work_dirs").expanduser().absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def planned_checkpoints(context: Context) -> int:
    """How many checkpoints exist at once: those that are kept, and the one being written."""
    keep = context.get("default_hooks.checkpoint.max_keep_ckpts", -1)
    interval = context.get("default_hooks.checkpoint.interval", 1)
    by_epoch = context.get("default_hooks.checkpoint.by_epoch", True)
    length = context.get("train_cfg.max_epochs" if by_epoch else "train_cfg.max_iters")
    known = is_number(length) and is_number(interval) and interval > 0
    total = max(1, math.ceil(length / interval)) if known else None
    if not is_number(keep) or keep <= 0:
        return total or 1  # the number of iterations is not known before the data are prepared
    return min(int(keep) + 1, total) if total else int(keep) + 1


def checkpoint_bytes(context: Context) -> float | None:
    """About the size of a checkpoint; None where the base model's files are not here."""
    base = base_path(context)
    config = model_json(base, "config.json")
    if not config:
        return None
    text = config.get("text_config") or config
    if context.get("model.lora") is not None:
        parameters = _adapter_parameters(text, context.get("model.lora.r"))
    elif name_of(context.get("model.type")) == "SupervisedFinetune":
        parameters = _parameters(base, config)
    else:
        return None
    if parameters is None:
        return None
    states = ADAM_STATES if context.get("default_hooks.checkpoint.save_optimizer", True) else 0
    in_two_bytes = "16" in str(context.get("model.llm.dtype")) and not context.get("model.lora")
    return parameters * (1 + states) * (2 if in_two_bytes else 4)


def _parameters(base: str, config: dict[str, Any]) -> float | None:
    index = model_json(base, "model.safetensors.index.json")
    size = (index.get("metadata") or {}).get("total_size")
    if not is_number(size):
        file = model_file(base, "model.safetensors")
        if file is None:
            return None
        size = file.stat().st_size
    return size / (4 if "32" in str(config.get("dtype") or config.get("torch_dtype")) else 2)


def _adapter_parameters(text: dict[str, Any], rank: object) -> float | None:
    """Of an adapter on all linear layers of a decoder."""
    named = (text.get(key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    sizes = [size for size in named if is_number(size)]
    if not is_number(rank) or len(sizes) < 3:
        return None
    hidden, intermediate, layers = sizes
    return layers * rank * (4 * 2 * hidden + 3 * (hidden + intermediate))


def model_json(name: str, file: str) -> dict[str, Any]:
    """A JSON file of a model's folder, or of the hub's cache; {} where there is none."""
    path = model_file(name, file) if name else None
    try:
        content = json.loads(path.read_text("utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def vocabulary_size(config: dict[str, Any]) -> int | None:
    """The rows of the embedding, by a model's ``config.json``; None where it does not say."""
    text = config.get("text_config") or config.get("llm_config") or config
    size = text.get("padded_vocab_size") or text.get("vocab_size")
    return size if isinstance(size, int) else None


@rule(
    "XT0344",
    WARNING,
    N_("tokens that the model has no embedding for"),
    N_(
        "The tokenizer has ids beyond the model's embedding. A row with one of them is refused "
        "before the model is loaded. model.tokenizer = tokenizer makes room for added tokens."
    ),
    wrong="tokenizer = dict(pretrained_model_name_or_path='./with_new_tokens')\n"
    "model = dict(llm=dict(pretrained_model_name_or_path='./model'))",
    right="tokenizer = dict(pretrained_model_name_or_path='./with_new_tokens')\n"
    "model = dict(llm=dict(pretrained_model_name_or_path='./model'), tokenizer=tokenizer)",
)
def tokens_without_embedding(context: Context) -> Iterator[Finding]:
    key = "tokenizer.pretrained_model_name_or_path"
    name = context.get(key)
    size = vocabulary_size(model_json(base_path(context), "config.json"))
    if not isinstance(name, str) or size is None or context.get("model.tokenizer") is not None:
        return
    content = model_json(name, "tokenizer.json")
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {
        row[0]: number for number, row in enumerate(vocabulary)
    }  # fmt: skip
    ids |= {token.get("content"): token.get("id") for token in content.get("added_tokens") or []}
    beyond = [token for token, number in ids.items() if is_number(number) and number >= size]
    if beyond:
        yield Finding(
            key,
            tr(
                "the model has embeddings for {size} tokens; the tokenizer has {count} more: "
                "{tokens}",
                size=size,
                count=len(beyond),
                tokens=", ".join(repr(token) for token in beyond[:3]),
            ),
            tr("use the model's own tokenizer, or model.tokenizer = tokenizer for added tokens."),
        )
