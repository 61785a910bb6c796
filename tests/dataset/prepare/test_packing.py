"""Packs as arrays are those of the plain way."""

import bisect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner.dataset.prepare.packing import (
    pack_stream,
    pack_whole,
)

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=40)


def whole_one_by_one(lengths, max_length):
    """Best fit, a sample at a time."""
    rows, room = [], []
    for number, length in enumerate(lengths):
        place = bisect.bisect_left(room, (length, -1))
        if place == len(room):
            rows.append([])
            room.append((max_length, len(rows) - 1))
        free, row = room.pop(place)
        rows[row].append((number, 0, length))
        if free > length:
            bisect.insort(room, (free - length, row))
    return rows


def stream_one_by_one(lengths, max_length):
    """A token at a time."""
    rows = []
    tokens = [(number, place) for number, length in enumerate(lengths) for place in range(length)]
    for start in range(0, len(tokens), max_length):
        rows.append([])
        for number, place in tokens[start : start + max_length]:
            if rows[-1] and rows[-1][-1][0] == number:
                rows[-1][-1] = (number, rows[-1][-1][1], place + 1)
            else:
                rows[-1].append((number, place, place + 1))
    return rows


@given(LENGTHS, st.integers(12, 30))
@settings(max_examples=100, deadline=None)
def test_packs_are_those_of_the_plain_way(lengths, max_length):
    assert pack_whole(lengths, max_length) == whole_one_by_one(lengths, max_length)
    assert pack_stream(lengths, max_length - 11) == stream_one_by_one(lengths, max_length - 11)


def test_samples_without_tokens_take_no_room_in_a_stream():
    assert pack_stream([0, 2, 0, 0, 3, 0], 4) == [[(1, 0, 2), (4, 0, 2)], [(4, 2, 3)]]


def test_a_sample_longer_than_a_row_is_named():
    with pytest.raises(ValueError, match="sample 1 has 9 tokens, more than a row's 8"):
        pack_whole([3, 9], 8)
