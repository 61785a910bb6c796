"""Boxes in answers: read from text and compared with the right ones."""

from __future__ import annotations

import re
from collections.abc import Sequence

RIGHT_ABOVE = 0.5
"""Intersection over union above which a box counts as found (as RefCOCO is scored)."""


def read_box(answer: str) -> list[int] | None:
    """The first four whole numbers of an answer; None when there are fewer."""
    numbers = [int(number) for number in re.findall(r"\d+", answer)]
    return numbers[:4] if len(numbers) >= 4 else None


def intersection_over_union(first: Sequence[float], second: Sequence[float]) -> float:
    """Of two boxes (x1, y1, x2, y2)."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    whole = _area(first) + _area(second) - shared
    return shared / whole if whole > 0 else 0.0


def accuracy(answers: Sequence[str], boxes: Sequence[Sequence[float]]) -> float:
    """Share of answers whose box is right.

    Args:
        answers: what the model said.
        boxes: the right ones.
    """
    right = 0
    for answer, box in zip(answers, boxes, strict=True):
        found = read_box(answer)
        right += found is not None and intersection_over_union(found, box) > RIGHT_ABOVE
    return right / max(1, len(boxes))


def _area(box: Sequence[float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
