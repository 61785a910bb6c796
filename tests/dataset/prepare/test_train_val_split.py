"""Held-out rows are drawn by the seed, and no row is in both parts or in none."""

import pytest
from datasets import Dataset

from tests.helpers.tiny import make_tokenizer
from xtuner.dataset import process_hf_dataset
from xtuner.dataset.prepare.train_val_split import split_indices
from xtuner.utils.errors import UserError

ROWS = Dataset.from_list(
    [{"conversation": [{"input": f"q{i}", "output": f"a{i}"}]} for i in range(20)]
)


@pytest.mark.parametrize(("size", "count"), [(0.25, 5), (3, 3), (0.001, 1)])
def test_the_parts_make_up_the_whole(size, count):
    numbers = list(range(7, 27))
    train, val = (split_indices(numbers, part, size, 1) for part in ("train", "val"))
    assert len(val) == count and sorted([*train, *val]) == numbers
    assert val == split_indices(numbers, "val", size, 1) != split_indices(numbers, "val", size, 2)


@pytest.mark.parametrize(("part", "size"), [("train", 20), ("val", 0), ("val", -1)])
def test_what_cannot_be_is_refused(part, size):
    with pytest.raises(UserError):
        split_indices(range(20), part, size, 0)


@pytest.mark.parametrize("pack", [True, False])
def test_prepared_parts_hold_different_rows(pack):
    settings = dict(
        tokenizer=make_tokenizer(), max_length=64, pack_to_max_length=pack, val_size=0.2
    )
    parts = [process_hf_dataset(ROWS, part=part, **settings) for part in ("train", "val")]
    rows = [{number for row in part["rows"] for number in row} for part in parts]
    assert len(rows[1]) == 4 and not rows[0] & rows[1] and len(rows[0] | rows[1]) == 20
