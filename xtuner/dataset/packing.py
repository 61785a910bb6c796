"""Several samples in one row, with nothing lost.

``pack_whole`` (for variable-length attention) keeps every sample whole and fills rows by best fit;
``pack_stream`` is the published concatenation, which cuts samples at the rows' ends. Both are
computed from the lengths alone, so that the result does not depend on the number of processes.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

Part = tuple[int, int, int]
"""A sample's number, and from and to which of its tokens."""


def pack_whole(lengths: Sequence[int], max_length: int) -> list[list[Part]]:
    """Put samples into rows of at most ``max_length`` tokens, each into the fullest that has room.

    Args:
        lengths: tokens of each sample, at most ``max_length``.
        max_length: tokens of a row.

    Returns:
        For each row its parts, all of them whole samples.

    Raises:
        ValueError: when a sample is longer than a row.
    """
    rows: list[list[Part]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for number, length in enumerate(lengths):
        if length > max_length:
            raise ValueError(f"sample {number} has {length} tokens, more than a row's {max_length}")
        place = bisect.bisect_left(room, (length, -1))
        if place == len(room):
            rows.append([])
            free, row = max_length, len(rows) - 1
        else:
            free, row = room.pop(place)
        rows[row].append((number, 0, length))
        if free > length:
            bisect.insort(room, (free - length, row))
    return rows


def pack_stream(lengths: Sequence[int], max_length: int) -> list[list[Part]]:
    """Join all samples and cut the stream every ``max_length`` tokens; the last row is shorter.

    Args:
        lengths: tokens of each sample.
        max_length: tokens of a row.

    Returns:
        For each row its parts.
    """
    rows: list[list[Part]] = []
    free = 0
    for number, length in enumerate(lengths):
        start = 0
        while start < length:
            if not free:
                rows.append([])
                free = max_length
            taken = min(free, length - start)
            rows[-1].append((number, start, start + taken))
            start, free = start + taken, free - taken
    return rows


def join(
    ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], parts: Sequence[Part]
) -> dict[str, list[int]]:
    """Make one packed row.

    Args:
        ids: ``input_ids`` of the parts' samples, by their numbers.
        labels: likewise.
        parts: what the row is made of.

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` (restarting), ``cumulative_len`` (borders from 0
        to the length).
    """
    sizes = [stop - start for _, start, stop in parts]
    return {
        "input_ids": [token for n, a, b in parts for token in ids[n][a:b]],
        "labels": [token for n, a, b in parts for token in labels[n][a:b]],
        "position_ids": [place for size in sizes for place in range(size)],
        "cumulative_len": np.cumsum([0, *sizes]).tolist(),
    }
