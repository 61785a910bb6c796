"""From rows to samples: too long ones, what is trained, order, and rows that cannot be read."""

import numpy as np
import pytest
from datasets import Dataset

from tests.helpers.tiny import make_tokenizer
from xtuner.dataset.map_fns import alpaca_map_fn, openai_map_fn, template_map_fn_factory
from xtuner.dataset.prepare.samples import Samples, Steps, encode_rows, map_one
from xtuner.dataset.prepare.token_stats import TokenStats
from xtuner.utils import PROMPT_TEMPLATE
from xtuner.utils.errors import UserError

TOKENIZER = make_tokenizer()


def encoded(rows, **settings):
    steps = Steps(None, None, {}, TOKENIZER, **settings)
    return encode_rows(Dataset.from_list(rows), range(100, 100 + len(rows)), steps, processes=1)


def tokens(*ids, labels=None):
    return {"input_ids": list(ids), "labels": list(ids if labels is None else labels)}


def rows_of(samples):
    ends = np.cumsum(samples.lengths)
    return [
        (row, samples.input_ids[end - size : end].tolist())
        for row, size, end in zip(samples.rows.tolist(), samples.lengths, ends, strict=True)
    ]


def test_too_long_samples_are_cut_split_dropped_or_refused():
    rows = [tokens(1, 2), tokens(3, 4, 5, 6, 7, 8, 9)]
    cut = encoded(rows, max_length=3)
    assert rows_of(cut) == [(100, [1, 2]), (101, [3, 4, 5])]
    assert (cut.stats.rows_truncated, cut.stats.tokens_truncated) == ([101], 4)
    split = encoded(rows, max_length=3, long_samples="split")
    assert rows_of(split) == [(100, [1, 2]), (101, [3, 4, 5]), (101, [6, 7, 8]), (101, [9])]
    assert (split.stats.rows_trained, split.stats.tokens_trained) == (2, 9)
    drop = encoded(rows, max_length=3, long_samples="drop")
    assert rows_of(drop) == [(100, [1, 2])]
    assert (drop.stats.dropped["too_long"], drop.stats.tokens_dropped) == ([101], 7)
    with pytest.raises(UserError, match="row 101 has 7 tokens, more than max_length=3"):
        encoded(rows, max_length=3, long_samples="error")


def test_rows_without_a_label_are_dropped_unless_everything_is_trained():
    rows = [tokens(1, 2, labels=[-100, -100]), tokens(3, -200, 4, labels=[-100, -100, 4])]
    assert rows_of(encoded(rows)) == [(101, [3, -200, 4])]
    whole = encoded(rows, train_on="everything")
    assert whole.labels.tolist() == [1, 2, 3, -100, 4]
    assert len(encoded(rows, with_output=False)) == 2  # for generation nothing is needed


def test_a_part_of_a_split_row_without_a_label_stays():
    rows = [tokens(1, 2, 3, 4, labels=[-100, -100, 3, 4])]
    assert len(encoded(rows, max_length=2, long_samples="split")) == 2


def test_samples_in_another_order_and_some_of_them():
    samples = Samples.of({7: [tokens(1, 2)], 3: [tokens(4)], 5: [tokens(5, 6, 7)]}, TokenStats())
    order = np.array([1, 2, 0])
    assert rows_of(samples.picked(order)) == [(3, [4]), (5, [5, 6, 7]), (7, [1, 2])]
    kept = samples.chosen(np.array([True, False, True]))
    assert rows_of(kept) == [(7, [1, 2]), (5, [5, 6, 7])]
    joined = Samples.joined([kept, samples.chosen(np.array([False, True, False]))])
    assert rows_of(joined) == [(7, [1, 2]), (5, [5, 6, 7]), (3, [4])]
    assert samples.supervised().tolist() == [2, 1, 3]


def test_tokenised_rows_and_the_tokenizers_own_template_keep_the_order_of_rows():
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": talk}, {"messages": [*talk, *talk]}, {"messages": talk}]
    add = template_map_fn_factory(PROMPT_TEMPLATE.auto)
    steps = Steps(openai_map_fn, add, {}, TOKENIZER)
    made = encode_rows(Dataset.from_list(rows), range(3), steps, processes=1)
    assert made.rows.tolist() == [0, 1, 2]
    assert made.lengths[1] > made.lengths[0] == made.lengths[2]


def test_a_row_that_cannot_be_read_is_named():
    steps = Steps(alpaca_map_fn, None, {}, TOKENIZER)
    with pytest.raises(UserError, match=r"alpaca_map_fn cannot .*fields are: foo") as caught:
        map_one({"foo": 1}, steps)
    assert "check-custom-dataset" in caught.value.hint
    with pytest.raises(UserError, match="row 100: it has no 'conversation'"):
        encoded([{"foo": 1}])
    image = [{"type": "image_url"}]
    talk = [{"role": "user", "content": image}, {"role": "assistant", "content": "a"}]
    steps = Steps(openai_map_fn, None, {}, TOKENIZER)
    with pytest.raises(UserError, match=r"openai_map_fn cannot read it .*image_url"):
        map_one({"messages": talk}, steps)


def test_columns_are_renamed_after_mapping():
    steps = Steps(None, None, {"turns": "conversation"}, TOKENIZER)
    assert map_one({"turns": []}, steps) == {"conversation": []}


def test_trained_tokens_are_counted_by_sample_also_where_one_has_no_token():
    labels = [-100, 1, 2, -100, 3]
    for lengths, counts in {(0, 2, 0, 0, 3, 0): [0, 1, 0, 0, 2, 0], (5,): [3]}.items():
        made = Samples(
            np.array(labels, dtype=np.int32),
            np.array(labels, dtype=np.int32),
            np.array(lengths),
            np.arange(len(lengths)),
        )
        assert made.supervised().tolist() == counts
