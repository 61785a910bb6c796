"""Several samples in one row, with nothing lost.

``pack_whole`` (for variable-length attention) keeps every sample whole and fills rows by best fit;
``pack_stream`` is the published concatenation, which cuts samples at the rows' ends. Both are
computed from the lengths alone, so that the result does not depend on the number of processes.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Part = tuple[int, int, int]
"""A sample's number, and from and to which of its tokens."""
Numbers = npt.NDArray[np.int64]
ROW_BITS = 32


@dataclass(frozen=True)
class Packs:
    """Rows of parts of samples, as flat arrays.

    Attributes:
        samples: (parts,) the number of the sample that each part is of, row after row.
        froms, tos: (parts,) from and to which of its tokens.
        counts: (rows,) how many parts each row has.
    """

    samples: Numbers
    starts: Numbers
    stops: Numbers
    counts: Numbers

    def __len__(self) -> int:
        return len(self.counts)

    def slice(self, start: int, stop: int) -> Packs:
        """The rows from one number to another."""
        first, last = int(self.counts[:start].sum()), int(self.counts[:stop].sum())
        parts = slice(first, last)
        counts = self.counts[start:stop]
        return Packs(self.samples[parts], self.starts[parts], self.stops[parts], counts)

    def parts(self) -> list[list[Part]]:
        """For each row its parts."""
        columns = self.samples.tolist(), self.starts.tolist(), self.stops.tolist()
        parts = zip(*columns, strict=True)
        return [list(itertools.islice(parts, count)) for count in self.counts.tolist()]


def pack_whole(lengths: Sequence[int], max_length: int) -> list[list[Part]]:
    """``best_fit_packs``, for each row its parts."""
    return best_fit_packs(np.array(lengths, dtype=np.int64), max_length).parts()


def best_fit_packs(lengths: Numbers, max_length: int) -> Packs:
    """Put samples into rows of at most ``max_length`` tokens, each into the fullest that has room.

    Args:
        lengths: (samples,) tokens of each, at most ``max_length``.
        max_length: tokens of a row.

    Returns:
        Rows whose parts are all of them whole samples.

    Raises:
        ValueError: when a sample is longer than a row.
    """
    rows = np.array(_best_fit(lengths.tolist(), max_length), dtype=np.int64)
    order = np.argsort(rows, kind="stable")
    sizes = lengths[order]
    return Packs(order, np.zeros_like(sizes), sizes, np.bincount(rows))


def _best_fit(lengths: list[int], max_length: int) -> list[int]:
    """The row that each sample is put into."""
    row_of: list[int] = []
    rows = 0
    room: list[int] = []  # sorted: free tokens, and in the lower bits the row that has them
    for number, length in enumerate(lengths):
        if length > max_length:
            raise ValueError(f"sample {number} has {length} tokens, more than a row's {max_length}")
        place = bisect.bisect_left(room, length << ROW_BITS)
        if place == len(room):
            free, row = max_length, rows
            rows += 1
        else:
            free, row = divmod(room.pop(place), 1 << ROW_BITS)
        row_of.append(row)
        if free > length:
            bisect.insort(room, ((free - length) << ROW_BITS) + row)
    return row_of


def pack_stream(lengths: Sequence[int], max_length: int) -> list[list[Part]]:
    """``concat_and_chunk``, for each row its parts."""
    return concat_and_chunk(np.array(lengths, dtype=np.int64), max_length).parts()


def concat_and_chunk(lengths: Numbers, max_length: int) -> Packs:
    """Join all samples and cut the stream every ``max_length`` tokens; the last row is shorter.

    Args:
        lengths: (samples,) tokens of each.
        max_length: tokens of a row.
    """
    ends = np.cumsum(lengths)
    total = int(lengths.sum())
    bounds = np.unique(np.concatenate([[0], ends, np.arange(0, total, max_length)]))
    starts, stops = bounds[:-1], bounds[1:]
    samples = np.searchsorted(ends, starts, side="right")
    offsets = (ends - lengths)[samples]
    counts = np.bincount(starts // max_length)
    return Packs(samples, starts - offsets, stops - offsets, counts)


def join(
    ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], parts: Sequence[Part]
) -> dict[str, list[int]]:
    """Make one packed row.

    Args:
        ids: ``input_ids`` of the parts' samples, by their numbers.
        labels: likewise.
        parts: what the row is made of.

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` (restarting), ``cumulative_len`` (bounds from 0
        to the length).
    """
    sizes = [stop - start for _, start, stop in parts]
    return {
        "input_ids": [token for n, a, b in parts for token in ids[n][a:b]],
        "labels": [token for n, a, b in parts for token in labels[n][a:b]],
        "position_ids": [place for size in sizes for place in range(size)],
        "cumulative_len": np.cumsum([0, *sizes]).tolist(),
    }
