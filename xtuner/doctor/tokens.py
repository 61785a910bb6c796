"""What becomes of the rows as tokens: lengths, what is cut, what is trained, how full packs are."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

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
    """

    lengths: array[int] = field(default_factory=lambda: array("i"))
    trained: int = 0
    lost: int = 0
    max_length: int | None = None
    packs: int = 0
    places: int = 0

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


def measure(
    rows: Iterable[dict[str, Any]],
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
        rows: ``{input_ids, labels, rows}`` of each row, not cut.
        facts: what is added to.
        max_length: tokens after which a row is cut.
        stop_ids: tokens that may end a trained answer; empty to leave that unchecked.
        place: where the raw row with a number (from 0) is.
        findings: where mistakes are noted.
        empty_thoughts: the ids of think blocks that hold nothing.
    """
    for number, row in enumerate(rows):
        labels = row["labels"]
        length = len(labels)
        facts.lengths.append(length)
        trained = (
            max_length - labels[:max_length].count(IGNORE_INDEX)
            if length > max_length
            else (length - labels.count(IGNORE_INDEX))
        )
        facts.trained += trained
        facts.lost += max(0, length - max_length)
        codes = []
        if length > max_length:
            codes.append("cut")
        elif trained and stop_ids and not _stops(labels, stop_ids):
            codes.append("no-stop")
        if length > VERY_LONG * max_length:
            codes.append("very-long")
        if not trained:
            codes.append("no-supervised-token")
        if any(_contains(labels, ids) for ids in empty_thoughts):
            codes.append("empty-think")
        tokens = tr("{length:,} tokens", length=length)
        for code in codes:
            where = place(row["rows"][0] if row.get("rows") else number)
            detail = "" if code in ("no-stop", "empty-think") else tokens
            findings.add(code, Place(where.file, where.line, detail))


def _contains(labels: Sequence[int], ids: Sequence[int]) -> bool:
    """Whether ids stand in a row somewhere."""
    if ids[0] not in labels:
        return False
    starts = (start for start, label in enumerate(labels) if label == ids[0])
    return any(list(labels[start : start + len(ids)]) == list(ids) for start in starts)


def _stops(labels: Sequence[int], stop_ids: Collection[int]) -> bool:
    """Whether every trained span has a stop token near its end.

    A template may train a newline after the stop token, so the last three count.
    """
    last: list[int] = []
    for label in (*labels, IGNORE_INDEX):
        if label != IGNORE_INDEX:
            last = [*last[-2:], label]
        elif last:
            if not any(token in stop_ids for token in last):
                return False
            last = []
    return True


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
