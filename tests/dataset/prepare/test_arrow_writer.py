"""Rows that are written are made of their parts, whatever the shards."""

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
)
from xtuner.dataset.prepare.samples import Samples
from xtuner.dataset.prepare.token_stats import TokenStats, token_stats_of

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=40)


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
    cu_seqlens = np.cumsum(sizes)[:-1]
    by_sample = [[part.tolist() for part in np.split(each, cu_seqlens)] for each in (ids, labels)]
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
