"""From a config's dataset to rows ready for training: map, template, encode, pack, remember.

The stages run in one process a machine, behind a file lock, and the result is kept in a cache by
content, so that the processes of a run share it and none waits inside a collective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xtuner.dataset import map_fns
from xtuner.dataset.map_fns import row_function
from xtuner.dataset.prepare import arrow_writer, cache, samples
from xtuner.dataset.prepare import packing as packs
from xtuner.dataset.prepare.arrow_writer import (
    read_samples,
    shuffled,
    unpacked_dataset,
    write_packed,
)
from xtuner.dataset.prepare.parallel_map import usable_processes
from xtuner.dataset.prepare.rows import (
    load_usable_rows,
)
from xtuner.dataset.prepare.samples import (
    Samples,
    Steps,
    encode_rows,
    fit_encoded,
    map_rows,
    require_some,
)
from xtuner.dataset.prepare.token_stats import TokenStats, attach
from xtuner.dataset.prepare.train_val_split import drawn_indices, split_indices
from xtuner.registry import BUILDER
from xtuner.tokenization import encode, messages, segments, thinking
from xtuner.utils.dataset_settings import require_settings
from xtuner.utils.types import RowFunction, Tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

# What of ``Steps`` is a plain value.
PLAIN_STEPS = (
    "renames",
    "max_length",
    "long_samples",
    "train_on",
    "with_output",
    "with_image_token",
    "bad_rows",
    "thinking",
)


@dataclass(frozen=True)
class Packing:
    """How samples share rows: ``whole``, or cut from one stream; shuffled by ``seed``, or not."""

    whole: bool
    max_length: int
    seed: int | None


def process_hf_dataset(
    dataset: Any,
    do_dataset_tokenization: bool = True,
    tokenizer: Tokenizer | Mapping[str, Any] | None = None,
    max_length: int | None = None,
    dataset_map_fn: RowFunction | str | Mapping[str, Any] | None = None,
    template_map_fn: RowFunction | str | Mapping[str, Any] | None = None,
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
    bad_rows: str = "error",
    train_thinking: str = "keep",
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
        map_num_proc: processes at most, where there are rows enough for several; the result does
            not depend on it.
        seed: of the shuffling and drawing.
        long_samples: what to do with samples longer than ``max_length`` when they are packed whole:
            ``cut``, ``split`` into several, ``drop``, or stop with an ``error``.
        train_on: ``answers`` (those without loss left out), the ``last_answer``, or ``everything``.
        val_size: rows kept from training, drawn by ``seed``: a share (below 1) or a number.
        part: ``train``, or ``val`` for just those rows.
        bad_rows: rows that the map function cannot read or the chat template refuses are an
            ``error``, or left out (``drop``) and counted; either way they are named.
        train_thinking: ``<think>`` blocks of answers: ``keep`` them, ``mask_empty`` ones (no loss),
            or ``drop`` the reasoning and mask empty ones.

    Returns:
        Columns ``input_ids``, ``labels``, ``length``, ``rows`` (numbers of the source rows); with
        varlen packing also ``position_ids`` and ``cumulative_len``.

    Raises:
        UserError: when rows cannot be read or mapped, naming the row; when no sample is left.
    """
    require_settings("process_hf_dataset", locals())
    if isinstance(tokenizer, Mapping):
        tokenizer = BUILDER.build(tokenizer)
    map_row = row_function(dataset_map_fn)
    rows, place, unreadable = load_usable_rows(dataset, split, bad_rows, as_text=_is_ours(map_row))
    drawn = drawn_indices(len(rows), max_dataset_length, seed)
    numbers = split_indices(drawn, part, val_size, seed)
    rows = rows.select(numbers) if len(numbers) < len(rows) else rows
    steps = Steps(
        map_row=map_row,
        add_template=row_function(template_map_fn),
        renames=_renames(rename_maps),
        tokenizer=tokenizer,
        # The published concatenation cuts at the ends of rows, not at those of samples.
        max_length=None if pack_to_max_length and not use_varlen_attn else max_length,
        long_samples=long_samples,
        train_on=train_on,
        with_output=input_ids_with_output,
        with_image_token=with_image_token,
        bad_rows=bad_rows,
        thinking=train_thinking,
        place=place,
    )
    if not do_dataset_tokenization:
        return _mapped(rows, numbers, steps)
    packing = None
    if pack_to_max_length:
        assert max_length is not None  # require_settings has seen to it
        packing = Packing(use_varlen_attn, max_length, seed if shuffle_before_pack else None)
    keep = packing is None and not remove_unused_columns
    return _prepared_once(rows, numbers, steps, packing, keep, map_num_proc, unreadable)


def _is_ours(map_row: RowFunction | None) -> bool:
    """Whether a map function is of this package: those read texts, the user's may read numbers."""
    return map_row is None or str(map_row.__module__).startswith(map_fns.__name__)


def _prepared_once(
    rows: Dataset,
    numbers: Sequence[int],
    steps: Steps,
    packing: Packing | None,
    keep_columns: bool,
    processes: int,
    unreadable: TokenStats,
) -> Dataset:
    """The training rows, from the cache or made now."""

    def key_of(steps: Steps, *settings: object) -> str:
        plain = {name: getattr(steps, name) for name in PLAIN_STEPS}
        return cache.content_key(
            rows,
            steps.tokenizer,
            [steps.map_row, steps.add_template],
            [plain, *settings],
            [segments, encode, messages, thinking, samples, arrow_writer, packs],
        )

    def write(folder: Path) -> None:
        encoded = _encoded_before(key_of(steps.unlimited(), None, False), steps)
        if encoded is None:
            encoded = encode_rows(rows, numbers, steps, processes)
            unreadable.add(encoded.stats)
            encoded.stats = unreadable
        require_some(encoded)
        if packing is not None:
            _write_packed(encoded, packing, folder, key, processes)
            return
        made = unpacked_dataset(encoded, key)
        if keep_columns:
            made = _with_source_columns(made, rows, numbers)
        attach(made, encoded.stats)
        made.save_to_disk(str(folder))

    key = key_of(steps, packing and asdict(packing), keep_columns)
    return cache.prepared_once(key, write)


def _encoded_before(key: str, steps: Steps) -> Samples | None:
    """The samples from rows that the data doctor has encoded; None where it has not."""
    found = cache.find(key)
    return None if found is None else fit_encoded(read_samples(found), steps)


def _renames(maps: Sequence[Any]) -> dict[str, str]:
    return {
        (pair["old"] if isinstance(pair, Mapping) else pair[0]): (
            pair["new"] if isinstance(pair, Mapping) else pair[1]
        )
        for pair in maps
    }


def _mapped(rows: Dataset, numbers: Sequence[int], steps: Steps) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(map_rows(rows, numbers, steps))


def _write_packed(encoded: Samples, packing: Packing, folder: Path, key: str, threads: int) -> None:
    order = np.arange(len(encoded))
    if packing.seed is not None:
        order = np.array(shuffled(len(encoded), packing.seed))
    pack = packs.best_fit_packs if packing.whole else packs.concat_and_chunk
    made = pack(encoded.lengths[order], packing.max_length)
    made = replace(made, samples=order[made.samples])
    threads = usable_processes(threads)
    write_packed(encoded, made, folder, for_varlen=packing.whole, key=key, threads=threads)


def _with_source_columns(made: Dataset, rows: Dataset, numbers: Sequence[int]) -> Dataset:
    """The rows with the columns that they had before, such as the subject of a question."""
    from datasets import concatenate_datasets

    places = {number: place for place, number in enumerate(numbers)}
    taken = {*made.column_names, "conversation"}
    source = rows.select([places[number] for (number,) in made["rows"]])
    source = source.remove_columns([name for name in source.column_names if name in taken])
    return concatenate_datasets([made, source], axis=1) if source.column_names else made
