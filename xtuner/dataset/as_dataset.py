"""Samples as a dataset of training rows: one to a row, or packed. Arrow is written from arrays."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from xtuner.dataset.packing import Packs
from xtuner.dataset.samples import Samples
from xtuner.utils.pieces import ITEM, Tokens

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_AT_ONCE = 1000


def one_a_row(samples: Samples, key: str) -> Dataset:
    """Columns ``input_ids``, ``labels``, ``length`` and ``rows`` (one number in each)."""
    return _dataset(_one_a_row(samples), key)


def packed(samples: Samples, packs: Packs, with_borders: bool, key: str) -> Dataset:
    """Rows of several samples.

    Args:
        samples: what is packed.
        packs: what each row is made of.
        key: names the result.
        with_borders: also ``position_ids``, restarting, and ``cumulative_len``, the borders.

    Returns:
        Columns ``input_ids``, ``labels``, ``length``, ``rows`` (numbers of the source rows).
    """
    return _dataset(_packed(samples, packs, with_borders), key)


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers below ``count`` in the order that a seed gives."""
    return random.Random(seed).sample(range(count), count)


def _dataset(batches: Iterator[pa.RecordBatch], key: str) -> Dataset:
    from datasets import Dataset

    # Without a fingerprint it would be found by pickling.
    return Dataset(pa.Table.from_batches(list(batches)), fingerprint=key)


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


def _packed(samples: Samples, packs: Packs, with_borders: bool) -> Iterator[pa.RecordBatch]:
    input_ids = _by_sample(samples.input_ids, samples.lengths)
    labels = _by_sample(samples.labels, samples.lengths)
    for begin in range(0, len(packs), ROWS_AT_ONCE):
        chosen = packs.some(begin, begin + ROWS_AT_ONCE)
        sizes = chosen.tos - chosen.froms
        firsts = np.cumsum(chosen.counts) - chosen.counts
        lengths = np.add.reduceat(sizes, firsts)
        columns = {
            "input_ids": _lists(_taken(input_ids, chosen), lengths),
            "labels": _lists(_taken(labels, chosen), lengths),
        }
        if with_borders:
            ends = np.cumsum(sizes)
            places = np.arange(ends[-1], dtype=np.int32)
            places -= np.repeat((ends - sizes).astype(np.int32), sizes)
            columns["position_ids"] = _lists(places, lengths)
            # Each row's borders are where its parts begin, and its end.
            row_starts = np.cumsum(lengths) - lengths
            begins = ends - sizes - np.repeat(row_starts, chosen.counts)
            borders = np.insert(begins, firsts + chosen.counts, lengths)
            columns["cumulative_len"] = _lists(borders, chosen.counts + 1)
        columns["length"] = lengths
        columns["rows"] = _lists(samples.rows[chosen.samples], chosen.counts)
        yield pa.RecordBatch.from_pydict(columns)


def _by_sample(tokens: Tokens, lengths: npt.NDArray[np.int64]) -> pa.LargeBinaryArray:
    """The tokens as the bytes of each sample: what Arrow gathers at the speed of memory."""
    borders = np.concatenate([[0], np.cumsum(lengths)]) * ITEM
    buffers = [None, pa.py_buffer(borders), pa.py_buffer(tokens)]
    return pa.Array.from_buffers(pa.large_binary(), len(lengths), buffers)


def _taken(by_sample: pa.LargeBinaryArray, packs: Packs) -> Tokens:
    """The tokens of all parts, one after the other."""
    # A sample that was cut stands in several parts, one after the other; only the first part and
    # the last can be without the rest of their sample.
    whole = np.concatenate([[True], np.diff(packs.samples) != 0])
    taken = by_sample.take(pa.array(packs.samples[whole]))
    tokens = np.frombuffer(taken.buffers()[2], dtype=np.int32)
    return tokens[packs.froms[0] :][: (packs.tos - packs.froms).sum()]


def _lists(values: npt.NDArray[np.integer], lengths: npt.NDArray[np.int64]) -> pa.ListArray:
    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(borders), pa.array(values))
