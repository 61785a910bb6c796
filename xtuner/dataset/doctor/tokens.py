"""What becomes of the rows as tokens: lengths, what is cut, what is trained, how full packs are."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.dataset.doctor.findings import Findings, Place
from xtuner.dataset.doctor.reading import Row
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.lang import tr

BATCH = 256
"""Rows that are encoded at a time."""
VERY_LONG = 8
"""A row is very long when it has this many times ``max_length`` tokens."""

Encoded = tuple[Sequence[int], Sequence[int]]
"""``input_ids`` and ``labels`` of one row, not cut."""
Encode = Callable[[list[dict[str, Any]]], list[Encoded]]


@dataclass(frozen=True)
class Sample:
    """A row as the model sees it, to show."""

    place: Place
    input_ids: Sequence[int]
    labels: Sequence[int]


class TokenTally:
    """Counts tokens row by row; keeps 4 bytes a row.

    Args:
        encode: turns raw rows into ids and labels of equal length.
        max_length: tokens after which a row is cut; None when rows are never cut.
        stop_ids: tokens that may end a trained answer; empty to leave that unchecked.
        findings: where mistakes are noted.
    """

    def __init__(
        self,
        *,
        encode: Encode,
        max_length: int | None,
        stop_ids: set[int],
        findings: Findings,
    ) -> None:
        self.encode = encode
        self.max_length = max_length
        self.stop_ids = stop_ids
        self.findings = findings
        self.lengths = array("i")
        self.trained = 0
        self.lost = 0
        self.sample: Sample | None = None
        self._waiting: list[Row] = []

    def add(self, row: Row) -> None:
        """Count a row; it is encoded together with others."""
        self._waiting.append(row)
        if len(self._waiting) == BATCH:
            self.flush()

    def flush(self) -> None:
        """Count the rows that still wait."""
        rows, self._waiting = self._waiting, []
        if not rows:
            return
        try:
            encoded = self.encode([row.value for row in rows])
        except Exception:  # one row spoils the batch: find out which
            encoded = [self._alone(row) for row in rows]
        for row, (input_ids, labels) in zip(rows, encoded, strict=True):
            if len(input_ids):
                self._count(row, input_ids, labels)

    def _alone(self, row: Row) -> Encoded:
        try:
            return self.encode([row.value])[0]
        except Exception as error:  # whatever a map function may raise
            detail = f"{type(error).__name__}: {error}"
            self.findings.add("map-fn-failed", Place(row.file, row.line, detail))
            return [], []

    def _count(self, row: Row, input_ids: Sequence[int], labels: Sequence[int]) -> None:
        length, limit = len(input_ids), self.max_length
        self.lengths.append(length)
        kept = list(labels if limit is None else labels[:limit])
        trained = len(kept) - kept.count(IGNORE_INDEX)
        self.trained += trained
        if limit is not None and length > limit:
            self.lost += length - limit
            self._add("cut", row, tr(f"{length} tokens", f"{length} 个词元"))
            if length > VERY_LONG * limit:
                self._add("very-long", row, tr(f"{length} tokens", f"{length} 个词元"))
        elif trained and self.stop_ids and not _stops(labels, self.stop_ids):
            self._add("no-stop", row)
        if not trained:
            self._add("no-supervised-token", row)
        elif self.sample is None:
            cut = None if limit is None else limit
            self.sample = Sample(Place(row.file, row.line), input_ids[:cut], labels[:cut])

    def _add(self, code: str, row: Row, detail: str = "") -> None:
        self.findings.add(code, Place(row.file, row.line, detail))


def _stops(labels: Sequence[int], stop_ids: set[int]) -> bool:
    """Whether every trained stretch has a stop token near its end.

    A template may train a newline after the stop token, so the last three count.
    """
    for index in range(len(labels)):
        ends = labels[index] != IGNORE_INDEX and (
            index + 1 == len(labels) or labels[index + 1] == IGNORE_INDEX
        )
        if ends and not stop_ids.intersection(labels[max(0, index - 2) : index + 1]):
            return False
    return True


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram: lengths from ``start`` up to, not including, ``stop``."""

    start: int
    stop: int
    count: int


def histogram(lengths: Sequence[int]) -> list[Bar]:
    """Lengths in at most 16 bars whose borders are powers of two; empty ends are left out."""
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
