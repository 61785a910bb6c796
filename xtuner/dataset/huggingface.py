"""From a config's dataset to rows ready for training: map, template, encode, pack, remember.

The stages run in one process a machine, behind a file lock, and the result is kept in a cache by
content, so that the processes of a run share it and none waits inside a collective.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from xtuner.dataset import cache, encode, messages, packing
from xtuner.dataset.account import Account, attach
from xtuner.dataset.held_out import rows_of_part
from xtuner.dataset.map_fns.auto import auto_map_fn
from xtuner.dataset.map_fns.dataset_map_fns.dialogue import openai_map_fn
from xtuner.dataset.rows import RowFunction, load_rows, row_function
from xtuner.registry import BUILDER
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.templates import AUTO_TEMPLATE

if TYPE_CHECKING:
    from datasets import Dataset

TRAIN_ON = ("answers", "last_answer", "everything")
LONG_SAMPLES = ("cut", "split", "drop", "error")
WRITE_BATCH = 1000


def process_hf_dataset(
    dataset: Any,
    do_dataset_tokenization: bool = True,
    tokenizer: Any = None,
    max_length: int | None = None,
    dataset_map_fn: Any = None,
    template_map_fn: Any = None,
    max_dataset_length: int | None = None,
    split: str | None = "train",
    remove_unused_columns: bool = False,
    rename_maps: Sequence[Any] = (),
    shuffle_before_pack: bool = True,
    pack_to_max_length: bool = True,
    use_varlen_attn: bool = False,
    input_ids_with_output: bool = True,
    with_image_token: bool = False,
    map_num_proc: int = 32,
    *,
    seed: int = 0,
    long_samples: str = "cut",
    train_on: str = "answers",
    val_size: float = 0,
    part: str = "train",
) -> Dataset:
    """Prepare a dataset for training.

    Args:
        dataset: a ``datasets.Dataset`` or ``DatasetDict``, or the config to build it from.
        do_dataset_tokenization: False returns the mapped rows without encoding them.
        tokenizer: a tokenizer, or the config to build it from.
        max_length: tokens of a row (packed) or of a sample (not packed).
        dataset_map_fn: row → ``{'conversation': [...]}``; None when rows are so already.
        template_map_fn: adds the template to the turns; None when they need none.
        max_dataset_length: rows drawn at random when there are more; None: all.
        split: of a ``DatasetDict``.
        remove_unused_columns: leave out what training does not read; packed rows never have it.
        rename_maps: ``dict(old=..., new=...)`` or pairs: columns to rename after mapping.
        shuffle_before_pack: shuffle the samples (by ``seed``) before they are packed.
        pack_to_max_length: put several samples into one row.
        use_varlen_attn: packed samples stay whole and do not see each other.
        input_ids_with_output: False leaves the answers out.
        with_image_token: ``<image>`` in a text stands for an image (multimodal datasets).
        map_num_proc: kept from v0.1; the result does not depend on processes, nor do we start any.
        seed: of the shuffling and drawing.
        long_samples: what to do with samples longer than ``max_length`` when they are packed whole:
            ``cut``, ``split`` into several, ``drop``, or stop with an ``error``.
        train_on: ``answers`` (those without loss left out), the ``last_answer``, or ``everything``.
        val_size: rows kept from training, drawn by ``seed``: a share (below 1) or a number.
        part: ``train``, or ``val`` for just those rows.

    Returns:
        Columns ``input_ids``, ``labels``, ``length``, ``rows`` (numbers of the source rows); with
        varlen packing also ``position_ids`` and ``cumulative_len``.

    Raises:
        UserError: when rows cannot be read or mapped, naming the row; when no sample is left.
    """
    _check_choice("long_samples", long_samples, LONG_SAMPLES)
    _check_choice("train_on", train_on, TRAIN_ON)
    if isinstance(tokenizer, Mapping):
        tokenizer = BUILDER.build(tokenizer)
    rows = load_rows(dataset, split)
    numbers: Sequence[int] = range(len(rows))
    if max_dataset_length is not None and len(rows) > max_dataset_length:
        numbers = sorted(random.Random(seed).sample(numbers, max_dataset_length))
    numbers = rows_of_part(numbers, part, val_size, seed)
    if len(numbers) < len(rows):
        rows = rows.select(numbers)
    map_row, add_template = row_function(dataset_map_fn), row_function(template_map_fn)
    renames = _renames(rename_maps)
    if not do_dataset_tokenization:
        return _mapped(rows, numbers, map_row, add_template, renames)
    settings = {
        "max_length": max_length,
        "shuffle": shuffle_before_pack,
        "pack": pack_to_max_length,
        "varlen": use_varlen_attn,
        "with_output": input_ids_with_output,
        "image": with_image_token,
        "seed": seed,
        "long": long_samples,
        "train_on": train_on,
        "keep_columns": not (pack_to_max_length or remove_unused_columns),
    }
    key = cache.content_key(
        rows, tokenizer, [map_row, add_template], [renames, settings], [encode, messages, packing]
    )
    return cache.prepared_once(
        key, lambda: _prepare(rows, numbers, tokenizer, map_row, add_template, renames, settings)
    )


def _check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{key}={value!r}", hint=f"one of: {', '.join(choices)}")


def _renames(maps: Sequence[Any]) -> dict[str, str]:
    return {
        (pair["old"] if isinstance(pair, Mapping) else pair[0]): (
            pair["new"] if isinstance(pair, Mapping) else pair[1]
        )
        for pair in maps
    }


def _map_one(
    number: int,
    row: Mapping[str, Any],
    map_row: RowFunction | None,
    add_template: RowFunction | None,
    renames: Mapping[str, str],
) -> dict[str, Any]:
    try:
        mapped = dict(row) if map_row is None else dict(row) | dict(map_row(row))
        mapped = {renames.get(name, name): value for name, value in mapped.items()}
        if add_template is not None and mapped.get("conversation"):
            mapped |= add_template(mapped)
        return mapped
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        name = getattr(map_row, "__name__", "dataset_map_fn")
        fields = ", ".join(row)
        raise UserError(
            tr(
                f"row {number}: {name} cannot read it ({type(error).__name__}: {error}); "
                f"its fields are: {fields}",
                f"第 {number} 行: {name} 无法读取（{type(error).__name__}: {error}），"
                f"字段有: {fields}",
            ),
            hint=tr(
                "'xtuner check-custom-dataset CONFIG' names the map function that fits.",
                "'xtuner check-custom-dataset CONFIG' 会指出合适的 map 函数。",
            ),
            where=Where(key="dataset_map_fn"),
        ) from error


def _mapped(
    rows: Any, numbers: Sequence[int], map_row: Any, add_template: Any, renames: Mapping[str, str]
) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(
        [
            _map_one(i, row, map_row, add_template, renames)
            for i, row in zip(numbers, rows, strict=True)
        ]
    )


def _prepare(
    rows: Any,
    numbers: Sequence[int],
    tokenizer: Any,
    map_row: RowFunction | None,
    add_template: RowFunction | None,
    renames: Mapping[str, str],
    settings: Mapping[str, Any],
) -> Dataset:
    account = Account(rows_in=len(rows), dropped={"empty": [], "no_label": [], "too_long": []})
    samples = _encoded(rows, numbers, tokenizer, map_row, add_template, renames, settings, account)
    if not samples:
        raise UserError(
            tr(
                f"no row is left to train on.\n{account.text()}",
                f"没有可以训练的数据。\n{account.text()}",
            ),
            hint=tr(
                "'xtuner check-custom-dataset CONFIG' tells why.",
                "'xtuner check-custom-dataset CONFIG' 会说明原因。",
            ),
        )
    account.rows_trained = len({sample["row"] for sample in samples})
    account.tokens_trained = sum(len(sample["input_ids"]) for sample in samples)
    account.tokens_supervised = sum(
        label != IGNORE_INDEX for sample in samples for label in sample["labels"]
    )
    made = _dataset(samples, settings)
    if settings["keep_columns"]:
        made = _with_source_columns(made, rows, numbers)
    attach(made, account)
    return made


def _with_source_columns(made: Dataset, rows: Any, numbers: Sequence[int]) -> Dataset:
    """The rows with the columns that they had before, such as the subject of a question."""
    from datasets import concatenate_datasets

    places = {number: place for place, number in enumerate(numbers)}
    taken = {*made.column_names, "conversation"}
    source = rows.select([places[number] for (number,) in made["rows"]])
    source = source.remove_columns([name for name in source.column_names if name in taken])
    return concatenate_datasets([made, source], axis=1) if source.column_names else made


def _encoded(
    rows: Any,
    numbers: Sequence[int],
    tokenizer: Any,
    map_row: RowFunction | None,
    add_template: RowFunction | None,
    renames: Mapping[str, str],
    settings: Mapping[str, Any],
    account: Account,
) -> list[dict[str, Any]]:
    """The samples with their row numbers; what is dropped or cut is written into the account."""
    own_template = getattr(add_template, "template", None) == AUTO_TEMPLATE
    reads_messages = map_row in (None, auto_map_fn, openai_map_fn)
    samples = []
    for number, row in zip(numbers, rows, strict=True):
        mapped = _map_one(number, row, map_row, add_template, renames)
        talk = mapped.get("messages") if own_template and reads_messages else None
        if not talk and "conversation" not in mapped and "input_ids" not in mapped:
            raise UserError(
                tr(
                    f"row {number} has no 'conversation'; its fields are: {', '.join(mapped)}",
                    f"第 {number} 行没有 'conversation'，字段有: {', '.join(mapped)}",
                ),
                hint=tr(
                    "set dataset_map_fn to the function of your format: "
                    "'xtuner list-dataset-format' lists them.",
                    "请把 dataset_map_fn 设为对应格式的函数，'xtuner list-dataset-format' 会列出。",
                ),
                where=Where(key="dataset_map_fn"),
            )
        sample: dict[str, Any]
        if talk:
            sample = _by_own_template(number, talk, mapped.get("tools"), tokenizer, settings)
        elif "conversation" not in mapped:  # tokenised already
            ids = list(mapped["input_ids"])
            sample = {"input_ids": ids, "labels": list(mapped.get("labels") or ids)}
        elif not mapped["conversation"]:
            account.dropped["empty"].append(number)
            continue
        elif own_template:
            talk = messages.messages_of(mapped["conversation"])
            sample = _by_own_template(number, talk, None, tokenizer, settings)
        else:
            sample = dict(
                encode.encode_conversation(
                    _with_loss_on(mapped["conversation"], settings["train_on"]),
                    tokenizer,
                    input_ids_with_output=settings["with_output"],
                    with_image_token=settings["image"],
                )
            )
        if settings["train_on"] == "everything":
            ids = sample["input_ids"]
            sample["labels"] = [token if token >= 0 else IGNORE_INDEX for token in ids]
        samples += _fitted(sample | {"row": number}, settings, account)
    return samples


def _with_loss_on(
    conversation: Sequence[Mapping[str, Any]], train_on: str
) -> Sequence[Mapping[str, Any]]:
    if train_on != "last_answer":
        return conversation
    before = [{**turn, "output_with_loss": False} for turn in conversation[:-1]]
    return [*before, conversation[-1]]


def _by_own_template(
    number: int,
    talk: Sequence[Mapping[str, Any]],
    tools: Any,
    tokenizer: Any,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    try:
        last_only = settings["train_on"] == "last_answer"
        return dict(messages.encode_messages(talk, tokenizer, tools=tools, last_only=last_only))
    except (ValueError, TemplateError) as error:
        raise UserError(
            tr(f"row {number}: {error}", f"第 {number} 行: {error}"),
            where=Where(key="template_map_fn"),
        ) from error


def _fitted(
    sample: dict[str, Any], settings: Mapping[str, Any], account: Account
) -> list[dict[str, Any]]:
    """The sample as it goes on: cut, split, dropped or refused where it is too long."""
    length, limit, number = len(sample["input_ids"]), settings["max_length"], sample["row"]
    account.tokens_in += length
    streamed = settings["pack"] and not settings["varlen"]
    parts = [sample]
    if limit and length > limit and not streamed:
        if settings["long"] == "error":
            raise UserError(
                tr(
                    f"row {number} has {length} tokens, more than max_length={limit}",
                    f"第 {number} 行有 {length} 个 token，超过 max_length={limit}",
                ),
                where=Where(key="max_length"),
            )
        if settings["long"] == "drop":
            account.dropped["too_long"].append(number)
            account.tokens_dropped += length
            return []
        starts = range(0, length, limit) if settings["long"] == "split" else [0]
        parts = [
            sample | {key: sample[key][a : a + limit] for key in ("input_ids", "labels")}
            for a in starts
        ]
        if settings["long"] == "cut":
            account.rows_cut.append(number)
            account.tokens_cut += length - limit
    if settings["with_output"] and all(
        label == IGNORE_INDEX for part in parts for label in part["labels"]
    ):
        account.dropped["no_label"].append(number)
        account.tokens_dropped += sum(len(part["input_ids"]) for part in parts)
        return []
    return parts


def _dataset(samples: list[dict[str, Any]], settings: Mapping[str, Any]) -> Dataset:
    from datasets import Dataset

    if not settings["pack"]:
        return Dataset.from_dict(
            {
                "input_ids": [sample["input_ids"] for sample in samples],
                "labels": [sample["labels"] for sample in samples],
                "length": [len(sample["input_ids"]) for sample in samples],
                "rows": [[sample["row"]] for sample in samples],
            }
        )
    limit = settings["max_length"]
    if not limit:
        raise UserError(
            tr("packing needs max_length", "打包数据需要 max_length"), where=Where(key="max_length")
        )
    if settings["shuffle"]:
        samples = random.Random(settings["seed"]).sample(samples, len(samples))
    ids = [sample["input_ids"] for sample in samples]
    labels = [sample["labels"] for sample in samples]
    pack = packing.pack_whole if settings["varlen"] else packing.pack_stream
    columns: dict[str, list[Any]] = {}
    for parts in pack([len(sample) for sample in ids], limit):
        row: dict[str, Any] = dict(packing.join(ids, labels, parts))
        if not settings["varlen"]:
            del row["cumulative_len"], row["position_ids"]
        row |= {"length": len(row["input_ids"]), "rows": [samples[n]["row"] for n, _, _ in parts]}
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return Dataset.from_dict(columns)
