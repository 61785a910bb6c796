"""What becomes of the rows as tokens: lengths, what is cut, what is trained, how full packs are."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from xtuner.doctor.findings import Findings, Place
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.lang import tr

VERY_LONG = 8
"""A row is very long when it has this many times ``max_length`` tokens."""


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram: lengths from ``start`` up to, not including, ``stop``."""

    start: int
    stop: int
    count: int


@dataclass
class TokenFacts:
    """A dataset in tokens.

    Args:
        lengths: tokens of each row before it is cut; 4 bytes a row.
        trained: tokens with a label, after cutting.
        lost: tokens that are cut off.
        max_length: tokens after which a row is cut; None when there are several limits.
        packs: how many packs the rows make; 0 when they are not packed.
        places: token places that these packs have.
        unmeasured: rows that are not part of the sample that was encoded; 0 where all were.
    """

    lengths: array[int] = field(default_factory=lambda: array("i"))
    trained: int = 0
    lost: int = 0
    max_length: int | None = None
    packs: int = 0
    places: int = 0
    unmeasured: int = 0

    @property
    def rows(self) -> int:
        """Rows of the dataset, measured or not."""
        return len(self.lengths) + self.unmeasured

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def fullness(self) -> float:
        """The part of all pack places that hold tokens, 0 to 1."""
        return (self.tokens - self.lost) / self.places if self.places else 0.0

    @property
    def median(self) -> int:
        return sorted(self.lengths)[len(self.lengths) // 2]


class Encoded(NamedTuple):
    """Some encoded rows as flat arrays.

    Attributes:
        labels: (tokens,) of all rows, one after the other.
        lengths: (rows,) tokens of each.
        numbers: (rows,) the number of the raw row that each is of.
    """

    labels: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]


def measure(
    batches: Iterable[Encoded],
    facts: TokenFacts,
    *,
    max_length: int,
    stop_ids: Collection[int],
    place: Callable[[int], Place],
    findings: Findings,
    empty_thoughts: Sequence[Sequence[int]] = (),
) -> None:
    """Count encoded rows.

    Args:
        batches: of all rows, not cut.
        facts: what is added to.
        max_length: tokens after which a row is cut.
        stop_ids: tokens that may end a trained answer; empty to leave that unchecked.
        place: where the raw row with a number (from 0) is.
        findings: where mistakes are noted.
        empty_thoughts: the ids of think blocks that hold nothing.
    """
    for batch in batches:
        lengths, row = batch.lengths, np.repeat(np.arange(len(batch.lengths)), batch.lengths)
        position = np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]
        is_trained = batch.labels != IGNORE_INDEX
        trained = np.bincount(row[is_trained & (position < max_length)], minlength=len(lengths))
        is_cut = lengths > max_length
        facts.lengths.extend(lengths.tolist())
        facts.trained += int(trained.sum())
        facts.lost += int((lengths[is_cut] - max_length).sum())
        codes = {
            "cut": is_cut,
            "no-stop": ~is_cut & (trained > 0),
            "very-long": lengths > VERY_LONG * max_length,
            "no-supervised-token": trained == 0,
            "empty-think": np.zeros(len(lengths), dtype=bool),
        }
        never_stops = np.zeros(len(lengths), dtype=bool)
        never_stops[row[_unstopped(batch.labels, row, stop_ids)]] = True
        codes["no-stop"] &= never_stops
        for ids in empty_thoughts:
            codes["empty-think"][row[_starts_of(ids, batch.labels, row)]] = True
        for index in np.flatnonzero(np.any(list(codes.values()), axis=0)).tolist():
            where = place(int(batch.numbers[index]))
            tokens = tr("{length:,} tokens", length=int(lengths[index]))
            for code, is_found in codes.items():
                if is_found[index]:
                    detail = "" if code in ("no-stop", "empty-think") else tokens
                    findings.add(code, Place(where.file, where.line, detail))


_Numbers = npt.NDArray[np.integer]


def _starts_of(ids: Sequence[int], labels: _Numbers, row: _Numbers) -> _Numbers:
    """Where ids stand in the labels, all within one row."""
    last = len(ids) - 1
    starts = np.flatnonzero(labels == ids[0])
    starts = starts[starts < len(labels) - last]
    for offset, token in enumerate(ids):
        starts = starts[labels[starts + offset] == token]
    return starts[row[starts] == row[starts + last]]


def _unstopped(labels: _Numbers, row: _Numbers, stop_ids: Collection[int]) -> _Numbers:
    """The last tokens of the trained spans that have no stop token near their end.

    A template may train a newline after the stop token, so the last three tokens count.
    """
    is_trained = labels != IGNORE_INDEX
    goes_on = np.append(is_trained[1:] & (row[1:] == row[:-1]), False)[: len(labels)]
    ends = np.flatnonzero(is_trained & ~goes_on) if stop_ids else np.empty(0, dtype=np.int64)
    is_inside = np.ones(len(ends), dtype=bool)
    stops = np.zeros(len(ends), dtype=bool)
    for back in range(3):
        token = np.maximum(ends - back, 0)
        is_inside &= (ends >= back) & is_trained[token] & (row[token] == row[ends])
        stops |= is_inside & np.isin(labels[token], list(stop_ids))
    return ends[~stops]


def histogram(lengths: Sequence[int]) -> list[Bar]:
    """Lengths in at most 16 bars whose edges are powers of two; empty ends are left out."""
    counts: dict[int, int] = {}
    for length in lengths:
        power = max(length, 1).bit_length() - 1
        counts[power] = counts.get(power, 0) + 1
    if not counts:
        return []
    return [
        Bar(2**power, 2 ** (power + 1), counts.get(power, 0))
        for power in range(min(counts), max(counts) + 1)
    ]
