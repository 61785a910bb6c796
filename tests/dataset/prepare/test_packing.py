"""Packs as arrays are those of the plain way, and the rows that are written are made of them."""

import bisect

import numpy as np
import pytest
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner.dataset.prepare import arrow_writer
from xtuner.dataset.prepare.packing import (
    best_fit_packs,
    concat_and_chunk,
    join,
    pack_stream,
    pack_whole,
)
from xtuner.dataset.prepare.samples import Samples
from xtuner.dataset.prepare.token_stats import TokenStats, token_stats_of

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


@pytest.mark.parametrize("whole", [True, False])
@given(lengths=LENGTHS, seed=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_written_rows_are_made_of_their_parts(whole, lengths, seed, tmp_path_factory):
    draw = np.random.default_rng(seed)
    sizes = np.array(lengths)
    ids = draw.integers(0, 99, sizes.sum(), dtype=np.int32)
    labels = np.where(ids % 3 == 0, ids, -100).astype(np.int32)
    samples = Samples(ids, labels, sizes, draw.permutation(len(sizes)), TokenStats(rows_in=7))
    order = draw.permutation(len(sizes))
    made = (best_fit_packs if whole else concat_and_chunk)(sizes[order], 13)
    made = type(made)(order[made.samples], made.starts, made.stops, made.counts)
    folder = tmp_path_factory.mktemp("written") / "rows"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrow_writer, "SHARDS", 3)
        patch.setattr(arrow_writer, "TOKENS_AT_ONCE", 40)
        arrow_writer.write_packed(samples, made, folder, for_varlen=whole, key="k", threads=2)
    written = load_from_disk(str(folder))
    borders = np.cumsum(sizes)[:-1]
    by_sample = [[part.tolist() for part in np.split(each, borders)] for each in (ids, labels)]
    expected = []
    for parts in made.parts():
        row = join(*by_sample, parts)
        row |= {
            "length": len(row["input_ids"]),
            "rows": [int(samples.rows[n]) for n, _, _ in parts],
        }
        if not whole:
            del row["position_ids"], row["cumulative_len"]
        expected.append(row)
    assert written.to_list() == expected
    assert token_stats_of(written).rows_in == 7
