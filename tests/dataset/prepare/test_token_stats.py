"""What became of rows and tokens: added up, kept with a dataset, named as files have it."""

import json

from datasets import Dataset, load_from_disk

from xtuner.dataset.concat import ConcatDataset
from xtuner.dataset.prepare.token_stats import (
    KEY,
    TokenStats,
    all_token_stats,
    attach,
    token_stats_of,
)

STATS = TokenStats(rows_in=9, tokens_truncated=5, rows_truncated=[1, 4], dropped={"empty": [2]})


def test_the_names_in_files_stay():
    saved = STATS.to_dict()
    assert {"tokens_cut": 5, "rows_cut": [1, 4]}.items() <= saved.items()
    assert TokenStats.from_dict(json.loads(json.dumps(saved))) == STATS
    assert TokenStats.from_dict({"rows_in": 3, "of_a_later_version": 1}) == TokenStats(rows_in=3)


def test_they_are_kept_through_saving_and_joining(tmp_path):
    data = Dataset.from_dict({"input_ids": [[1]]})
    assert token_stats_of(data) is None
    attach(data, STATS)
    data.save_to_disk(str(tmp_path / "d"))
    loaded = load_from_disk(str(tmp_path / "d"))
    assert token_stats_of(loaded) == STATS
    assert json.loads(loaded.info.description)[KEY]["tokens_cut"] == 5
    plain = Dataset.from_dict({"input_ids": [[2]]})
    assert all_token_stats(ConcatDataset([loaded, plain, data])) == [STATS, STATS]


def test_counts_add_up_and_reasons_are_joined():
    total = TokenStats(rows_in=1, dropped={"empty": [0], "too_long": [7]})
    total.add(STATS)
    assert (total.rows_in, total.rows_truncated) == (10, [1, 4])
    assert total.dropped == {"empty": [0, 2], "too_long": [7]}
    assert STATS.dropped == {"empty": [2]}


def test_losses_name_the_first_rows():
    stats = TokenStats(rows_truncated=list(range(7)), dropped={"empty": [3], "no_label": []})
    assert stats.losses() == [
        "cut at max_length: 7 (rows 0, 1, 2, 3, 4, ...)",
        "dropped, rows without a conversation: 1 (rows 3)",
    ]
