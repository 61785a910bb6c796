"""A few rows of a user's data, the longest one among them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xtuner.dataset.prepare.rows import load_usable_rows

if TYPE_CHECKING:
    from datasets import Dataset

LOOKED_AT = 50_000
"""Rows among which the longest is looked for; of a larger dataset, evenly spread ones."""


def sample_rows(
    dataset: Dataset | Mapping[str, Any],
    count: int,
    split: str = "train",
    bad_rows: str = "error",
) -> Dataset:
    """Take a few rows: the first one, the longest one, and others spread evenly.

    Args:
        dataset: a ``datasets.Dataset`` or ``DatasetDict``, or the config to build it from.
        count: how many rows at most.
        split: of a ``DatasetDict``.
        bad_rows: ``drop`` to leave out lines that cannot be read, or ``error``.

    Returns:
        The rows in their order.
    """
    rows, _, _ = load_usable_rows(dataset, split, bad_rows)
    if len(rows) <= count:
        return rows
    chosen = set(spread(len(rows), count))
    longest = longest_row(rows)
    if longest not in chosen:
        chosen = {*sorted(chosen)[:-1], longest}
    return rows.select(sorted(chosen))


def spread(total: int, count: int) -> list[int]:
    """``count`` numbers below ``total`` at equal distances, 0 among them."""
    count = min(count, total)
    return [number * total // count for number in range(count)]


def longest_row(rows: Dataset) -> int:
    """The number of the row that takes most characters as JSON."""
    numbers = spread(len(rows), LOOKED_AT)
    looked_at = rows.select(numbers) if len(numbers) < len(rows) else rows
    sizes = [len(json.dumps(row, ensure_ascii=False, default=str)) for row in looked_at]
    return numbers[sizes.index(max(sizes))]
