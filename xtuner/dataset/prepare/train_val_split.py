"""Which rows of a dataset are taken, and which are kept from training, to validate with them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr


def drawn_indices(count: int, limit: int | None, seed: int) -> Sequence[int]:
    """The numbers of the rows: all, or so many drawn at random.

    Args:
        count: of the rows.
        limit: how many are taken; None for all.
        seed: of the drawing.
    """
    if limit is None or count <= limit:
        return range(count)
    return sorted(random.Random(seed).sample(range(count), limit))


def split_indices(numbers: Sequence[int], part: str, val_size: float, seed: int) -> Sequence[int]:
    """The rows of a part, in their order.

    Args:
        numbers: row numbers.
        part: ``train`` or ``val``.
        val_size: how many rows are kept from training: a share (below 1) or a number; 0 for none.
        seed: of the drawing.

    Raises:
        UserError: for a size that leaves nothing to train on.
    """
    if not val_size and part == "train":
        return numbers
    count = int(val_size) if val_size >= 1 else max(1, round(len(numbers) * val_size))
    if val_size <= 0 or count >= len(numbers):
        raise UserError(
            tr(
                "val_size={val_size} does not split {count} rows in two.",
                val_size=val_size,
                count=len(numbers),
            ),
            hint=tr("a share such as 0.02, or a number of rows."),
            where=Where(key="val_size"),
        )
    held_out = set(random.Random(f"{seed} val").sample(numbers, count))
    return [number for number in numbers if (number in held_out) == (part == "val")]
