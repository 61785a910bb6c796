"""Every column of a row counts, whatever its type; equal values give equal fingerprints."""

import numpy as np
import pytest
import torch

from xtuner.checkpoint.data_fingerprint import DataFingerprint

ROW = {
    "chosen_ids": [1, 2, 3],
    "rejected_ids": torch.tensor([4, 5]),
    "pixel_values": torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)),
    "score": 0.5,
    "scores": [0.5, 0.25],
    "text": "a",
    "turns": [{"role": "user", "content": "hello"}],
    "ragged": [[1], [2, 3]],
    "none": None,
}


def content(*rows, **settings):
    return DataFingerprint.of(list(rows), **settings).content


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("chosen_ids", [1, 2, 4]),
        ("chosen_ids", [1, 2]),
        ("rejected_ids", torch.tensor([4, 6])),
        ("pixel_values", torch.zeros(3, 4, 4)),
        ("pixel_values", ROW["pixel_values"][:, :2]),
        ("score", 0.25),
        ("scores", [0.5, 0.2501]),
        ("text", "b"),
        ("turns", [{"role": "user", "content": "hallo"}]),
        ("ragged", [[1, 2], [3]]),
        ("none", 0),
        ("new", 1),
    ],
)
def test_a_change_in_any_column_is_seen(column, value):
    assert content(ROW) != content(ROW | {column: value})


def test_lists_arrays_and_tensors_of_the_same_numbers_are_equal():
    kinds = ([1, 2, 3], np.array([1, 2, 3], np.int32), torch.tensor([1, 2, 3]))
    assert len({content({"input_ids": ids}) for ids in kinds}) == 1


def test_last_bits_of_an_image_do_not_count():
    """They differ between processors."""
    assert content(ROW) == content(ROW | {"pixel_values": ROW["pixel_values"] * (1 + 1e-6)})


def test_all_rows_or_evenly_spread_ones():
    rows = [{"input_ids": [n]} for n in range(1000)]
    changed = [*rows[:1], {"input_ids": [7]}, *rows[2:]]
    assert content(*rows) == content(*changed)  # not among the 64
    assert content(*rows, sampled=None) != content(*changed, sampled=None)
    assert DataFingerprint.of(rows).rows == 1000
    assert DataFingerprint.of([]).rows == 0
