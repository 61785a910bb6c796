"""The rows of a config encoded as training encodes them: built with its own settings, measured."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from xtuner.dataset.prepare.token_stats import FIRST_ROWS, token_stats_of
from xtuner.doctor.findings import Findings
from xtuner.doctor.parts import PAIRS_BUILDER, PARTS_BUILDER, find_parts, name_of
from xtuner.doctor.pictures import pictures_of
from xtuner.doctor.places import Places
from xtuner.doctor.show import Shown, show_sample
from xtuner.doctor.tokens import Encoded, TokenFacts, measure
from xtuner.tokenization.chat_template import answer_stops
from xtuner.utils.constants import PREFERENCE_SIDES
from xtuner.utils.lang import tr
from xtuner.utils.types import Tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_BUILDERS = ("process_hf_dataset", "process_ms_dataset")
BATCH = 4000
"""Rows read at a time from an encoded dataset."""
DEFAULT_LENGTH = 2048
"""``max_length`` of datasets with images."""
SAMPLED_ROWS = 100_000
"""Of a larger table of text so many rows, drawn at random, are encoded; training encodes all."""


def text_datasets(dataset: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of each dataset that can be measured; empty when one cannot."""
    if name_of(dataset.get("type", "")) == "ConcatDataset":
        parts = [text_datasets(one) for one in dataset["datasets"]]
        return [one for part in parts for one in part] if all(parts) else []
    if _has_images(dataset) and dataset.get("processor"):
        return [{"max_length": DEFAULT_LENGTH, **dataset}]
    is_text = name_of(dataset.get("type", "")) in TEXT_BUILDERS
    return [dataset] if is_text and dataset.get("tokenizer") and dataset.get("max_length") else []


def _has_images(settings: Mapping[str, Any]) -> bool:
    return name_of(settings.get("type", "")) in (PARTS_BUILDER, PAIRS_BUILDER)


def measure_all(
    datasets: list[Mapping[str, Any]], findings: Findings, *, rows: Sequence[int] = ()
) -> tuple[TokenFacts, Shown | None]:
    """Build and measure datasets; also gives the first trained row, to show.

    The datasets are built a second time with packing as training does, from the same samples; that
    fills the cache that training reads. Of a large table a sample is built instead, not packed.

    Args:
        datasets: settings of ``text_datasets``.
        findings: where mistakes are noted.
        rows: of each dataset; of more than ``SAMPLED_ROWS`` so many are built. Empty: build all.
    """
    facts, shown = TokenFacts(), None
    limits = {int(settings["max_length"]) for settings in datasets}
    facts.max_length = limits.pop() if len(limits) == 1 else None
    for index, settings in enumerate(datasets):
        limit = int(settings["max_length"])
        unmeasured = _unmeasured(settings, rows[index] if rows else 0)
        facts.unmeasured += unmeasured
        loose = {**settings, "pack_to_max_length": False, "bad_rows": "drop"}
        loose["shuffle_before_pack"] = False
        if _has_images(settings):
            tokenizer = _build(settings["processor"]).tokenizer
            is_strict = settings.get("long_samples") == "error"
            built = _build({**loose, "long_samples": "drop"} if is_strict else loose)
            sides = getattr(built, "sides", {"": built})  # of a pair each answer is counted
            tables = [side.table for side in sides.values()]
        else:
            tokenizer = _build(settings["tokenizer"])
            whole = {"max_length": None, "long_samples": "cut", "remove_unused_columns": True}
            if unmeasured:
                loose["max_dataset_length"] = SAMPLED_ROWS
            built = _build({**loose, "tokenizer": tokenizer, **whole})
            tables = [built]
        (part,) = find_parts(settings)
        places = Places(part)
        measure(
            chain.from_iterable(map(_each, tables)),
            facts,
            max_length=limit,
            stop_ids=_stop_ids(settings, tokenizer),
            place=places,
            findings=findings,
            empty_thoughts=_empty_thoughts(tokenizer),
        )
        bad = _note_bad_rows(tables, settings, places, findings)
        shown = shown or _first(built, limit, tokenizer, places)
        del built, tables  # mapped into memory
        if settings.get("pack_to_max_length", not _is_pair(settings)) and not (bad or unmeasured):
            packs = len(_build(settings))
            facts.packs += packs
            facts.places += packs * limit
    return facts, shown


def _unmeasured(settings: Mapping[str, Any], rows: int) -> int:
    """How many of a dataset's rows are not encoded: those of a large table beyond the sample."""
    if name_of(settings.get("type", "")) != "process_hf_dataset":
        return 0
    trained = min(rows, settings.get("max_dataset_length") or rows)
    return max(0, trained - SAMPLED_ROWS)


def _is_pair(settings: Mapping[str, Any]) -> bool:
    return name_of(settings.get("type", "")) == PAIRS_BUILDER


def _note_bad_rows(
    tables: Sequence[Dataset], settings: Mapping[str, Any], places: Places, findings: Findings
) -> bool:
    """Note the rows that cannot be used; gives whether training refuses the dataset for them."""
    dropped = settings.get("bad_rows", "drop" if _has_images(settings) else "error") == "drop"
    noted: set[tuple[str, int]] = set()
    for stats in filter(None, map(token_stats_of, tables)):
        unreadable = len(stats.dropped.get("unreadable", []))  # found by the scan
        for index, number in enumerate(stats.dropped.get("bad", []), min(unreadable, FIRST_ROWS)):
            where = places(number)
            why = stats.bad_rows[index] if index < len(stats.bad_rows) else ""
            detail = why.removeprefix(f"{where}: ")
            code = "left-out" if dropped else "bad-row"
            if (code, number) not in noted:
                findings.add(code, replace(where, detail=detail))
            noted.add((code, number))
        for number in stats.dropped.get("too_long", []):
            if ("too-long", number) not in noted:
                findings.add("too-long", places(number))
            noted.add(("too-long", number))
    return not dropped and any(code == "bad-row" for code, _ in noted)


def _empty_thoughts(tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of an empty think block, for a tokenizer that has the marks as tokens."""
    known = tokenizer.get_vocab()
    if "<think>" not in known or "</think>" not in known:
        return []
    blocks = (f"<think>{space}</think>" for space in ("", "\n", "\n\n"))
    return [list(tokenizer.encode(block, add_special_tokens=False)) for block in blocks]


def _build(settings: object) -> Any:
    from mmengine.config import ConfigDict

    from xtuner.registry import BUILDER

    return BUILDER.build(ConfigDict(settings)) if isinstance(settings, Mapping) else settings


def _each(dataset: Dataset) -> Iterator[Encoded]:
    names = [name for name in ("labels", "rows") if name in dataset.column_names]
    columns = dataset.select_columns(names).with_format("arrow")
    for start in range(0, len(columns), BATCH):
        batch = columns[start : start + BATCH].combine_chunks()
        labels = batch["labels"].chunk(0)
        numbers = np.arange(start, start + len(batch))
        if "rows" in names:
            numbers = pc.list_element(batch["rows"].chunk(0), 0).to_numpy()
        lengths = pc.list_value_length(labels).to_numpy().astype(np.int64)
        yield Encoded(labels.flatten().to_numpy(), lengths, numbers)


def as_pack(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A pair of answers about images as a row of two samples; another row as it is.

    Args:
        row: of any dataset.
    """
    if not isinstance(row.get("chosen"), Mapping):
        return row
    sides = [row[side] for side in PREFERENCE_SIDES]
    ends = np.cumsum([len(side["input_ids"]) for side in sides])
    joined = {
        name: [each for side in sides for each in side[name]]
        for name in ("input_ids", "labels", "images", "rows")
    }
    return {**joined, "cumulative_len": [0, *ends.tolist()]}


def _is_packed(row: Mapping[str, Any]) -> bool:
    return "cumulative_len" in row


def _first(dataset: Any, limit: int, tokenizer: Tokenizer, places: Places) -> Shown | None:
    if not len(dataset):
        return None
    row = as_pack(dataset[0])
    where = places(row["rows"][0] if row.get("rows") else 0)
    return show_sample(
        tr("A row as the model sees it"),
        row["input_ids"] if _is_packed(row) else row["input_ids"][:limit],
        row["labels"] if _is_packed(row) else row["labels"][:limit],
        tokenizer.decode,
        cu_seqlens=row.get("cumulative_len"),
        sources=[str(where)] * (2 if _is_packed(row) else 1),
        pictures=pictures_of(row.get("images") or []),
    )


def _stop_ids(settings: Mapping[str, Any], tokenizer: Tokenizer) -> Collection[int]:
    """Tokens that may end an answer: eos and the stop words of the template.

    Empty without a template (continued text ends nowhere).
    """
    from mmengine.config import ConfigDict

    template = settings.get("template_map_fn")
    if not isinstance(template, Mapping) or "pretrain" in name_of(settings.get("dataset_map_fn")):
        return ()
    fields = ConfigDict(template)["template"]
    return answer_stops(tokenizer, fields if isinstance(fields, Mapping) else None)[0]
