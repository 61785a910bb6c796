"""Samples as a dataset of training rows: one to a row, or packed. Arrow is written from arrays."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from xtuner.dataset.packing import Part
from xtuner.dataset.samples import Samples

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_AT_ONCE = 1000


def one_a_row(samples: Samples) -> Dataset:
    """Columns ``input_ids``, ``labels``, ``length`` and ``rows`` (one number in each)."""
    return _dataset(_one_a_row(samples))


def packed(samples: Samples, packs: Sequence[Sequence[Part]], with_borders: bool) -> Dataset:
    """Rows of several samples.

    Args:
        samples: what is packed.
        packs: for each row its parts.
        with_borders: also ``position_ids``, restarting, and ``cumulative_len``, the borders.

    Returns:
        Columns ``input_ids``, ``labels``, ``length``, ``rows`` (numbers of the source rows).
    """
    return _dataset(_packed(samples, packs, with_borders))


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers below ``count`` in the order that a seed gives."""
    return random.Random(seed).sample(range(count), count)


def _dataset(batches: Iterator[pa.RecordBatch]) -> Dataset:
    from datasets import Dataset

    table = pa.Table.from_batches(list(batches))
    content = hashlib.blake2b(digest_size=16)
    for column in table.columns:
        for chunk in column.chunks:
            for buffer in chunk.buffers():
                content.update(buffer or b"")
    return Dataset(table, fingerprint=content.hexdigest())  # it would be found by pickling


def _one_a_row(samples: Samples) -> Iterator[pa.RecordBatch]:
    ends = np.cumsum(samples.lengths)
    for start in range(0, len(samples), ROWS_AT_ONCE):
        chosen = slice(start, start + ROWS_AT_ONCE)
        lengths = samples.lengths[chosen]
        first, last = ends[start] - lengths[0], ends[chosen][-1]
        yield pa.RecordBatch.from_pydict(
            {
                "input_ids": _lists(samples.input_ids[first:last], lengths),
                "labels": _lists(samples.labels[first:last], lengths),
                "length": lengths,
                "rows": _lists(samples.rows[chosen], np.ones(len(lengths), dtype=np.int64)),
            }
        )


def _packed(
    samples: Samples, packs: Sequence[Sequence[Part]], with_borders: bool
) -> Iterator[pa.RecordBatch]:
    starts = np.cumsum(samples.lengths) - samples.lengths
    for begin in range(0, len(packs), ROWS_AT_ONCE):
        chosen = packs[begin : begin + ROWS_AT_ONCE]
        numbers, froms, tos = np.array([part for parts in chosen for part in parts]).T
        counts = np.array([len(parts) for parts in chosen], dtype=np.int64)
        sizes = tos - froms
        lengths = np.add.reduceat(sizes, np.cumsum(counts) - counts)
        begins = (starts[numbers] + froms).tolist()
        slices = [slice(a, a + size) for a, size in zip(begins, sizes.tolist(), strict=True)]
        columns = {
            "input_ids": _lists(np.concatenate([samples.input_ids[s] for s in slices]), lengths),
            "labels": _lists(np.concatenate([samples.labels[s] for s in slices]), lengths),
        }
        if with_borders:
            places = np.arange(int(sizes.max()), dtype=np.int32)
            positions = np.concatenate([places[:size] for size in sizes.tolist()])
            columns["position_ids"] = _lists(positions, lengths)
            borders = [np.cumsum([0, *(b - a for _, a, b in parts)]) for parts in chosen]
            columns["cumulative_len"] = _lists(np.concatenate(borders), counts + 1)
        columns["length"] = lengths
        columns["rows"] = _lists(samples.rows[numbers], counts)
        yield pa.RecordBatch.from_pydict(columns)


def _lists(values: npt.NDArray[np.integer], lengths: npt.NDArray[np.int64]) -> pa.ListArray:
    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(borders), pa.array(values))
