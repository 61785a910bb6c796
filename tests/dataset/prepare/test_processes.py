"""Nothing is lost and nothing depends on the number of processes, whatever the rows and packing."""

from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.tiny import make_tokenizer
from xtuner.dataset import process_hf_dataset
from xtuner.dataset.prepare import samples
from xtuner.dataset.prepare.parallel_map import ordered_map
from xtuner.dataset.prepare.token_stats import token_stats_of
from xtuner.tokenization.encode import encode_conversation
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.errors import UserError

TOKENIZER = make_tokenizer()
TEXT = st.text(alphabet="ab ,.\n的", max_size=40)
ROWS = st.lists(st.tuples(TEXT, TEXT), min_size=3, max_size=30)
PACKINGS = {
    "whole": dict(pack_to_max_length=True, use_varlen_attn=True),
    "stream": dict(pack_to_max_length=True, use_varlen_attn=False),
    "alone": dict(pack_to_max_length=False),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(samples, "CHUNK", 3)
    monkeypatch.setattr(samples, "ROWS_A_PROCESS", 4)
    monkeypatch.setattr(samples, "usable_processes", lambda wanted: wanted)


def supervised(rows):
    return Counter(token for row in rows for token in row["labels"] if token != IGNORE_INDEX)


def prepare(rows, processes, packing, monkeypatch, folder, seed=0, length=48, long="split"):
    monkeypatch.setenv("XTUNER_CACHE", str(folder))
    return process_hf_dataset(
        Dataset.from_list([{"conversation": [{"input": q, "output": a}]} for q, a in rows]),
        tokenizer=TOKENIZER,
        max_length=length,
        long_samples=long,
        map_num_proc=processes,
        seed=seed,
        **PACKINGS[packing],
    )


@pytest.mark.parametrize("packing", PACKINGS)
@settings(max_examples=6, deadline=None)
@given(rows=ROWS, seed=st.integers(0, 3))
def test_tokens_in_are_tokens_out(packing, tmp_path_factory, rows, seed):
    turns = [[{"input": q, "output": a}] for q, a in rows]
    expected = supervised(encode_conversation(turn, TOKENIZER) for turn in turns)
    made = []
    with pytest.MonkeyPatch.context() as patch:
        for processes in (1, 2, 4):
            folder = tmp_path_factory.mktemp("cache")
            made.append(prepare(rows, processes, packing, patch, folder, seed))
    assert supervised(made[0]) == expected
    assert token_stats_of(made[0]).tokens_supervised == sum(expected.values())
    for other in made[1:]:
        assert other.to_dict() == made[0].to_dict()
        assert token_stats_of(other) == token_stats_of(made[0])


def test_the_first_faulty_row_is_named_whoever_finds_it(tmp_path, monkeypatch):
    rows = [("a", "b" * 10)] * 30
    rows[7] = rows[20] = ("a", "b" * 300)
    with pytest.raises(UserError, match="row 7 has"):
        prepare(rows, 4, "whole", monkeypatch, tmp_path, long="error")


def one_by_one(rows, length, long):
    """The samples of rows, a row at a time, and the numbers of those that are too long."""
    made, too_long = [], []
    for number, (question, answer) in enumerate(rows):
        turn = {"input": question, "output": answer}
        if number % 3 == 1:
            sample = {"input_ids": [7] * len(answer), "labels": [number] * len(answer)}
        else:
            sample = encode_conversation([turn], TOKENIZER)
        ids, labels = sample["input_ids"], sample["labels"]
        too_long += [number] if len(ids) > length else []
        ends = len(ids) if long == "split" else 0 if long == "drop" and len(ids) > length else 1
        parts = [(ids[a : a + length], labels[a : a + length]) for a in range(0, ends, length)]
        if any(token != IGNORE_INDEX for _, part in parts for token in part):
            made += [(number, *part) for part in parts]
    return made, too_long


def some_tokenised(row):
    if row["number"] % 3 != 1:
        return {"conversation": [{"input": row["question"], "output": row["answer"]}]}
    size = len(row["answer"])
    return {"input_ids": [7] * size, "labels": [row["number"]] * size}


@pytest.mark.parametrize("long", ["cut", "split", "drop"])
@settings(max_examples=10, deadline=None)
@given(rows=ROWS)
def test_samples_are_those_of_a_row_at_a_time(long, rows):
    data = [{"number": n, "question": q, "answer": a} for n, (q, a) in enumerate(rows)]
    data = Dataset.from_list(data)
    steps = samples.Steps(some_tokenised, None, {}, TOKENIZER, max_length=9, long_samples=long)
    expected, too_long = one_by_one(rows, 9, long)
    for processes in (1, 2):
        made = samples.encode_rows(data, range(100, 100 + len(rows)), steps, processes)
        ends = made.lengths.cumsum().tolist()
        spans = list(zip([0, *ends], ends, strict=False))
        found = [(made.input_ids[a:b].tolist(), made.labels[a:b].tolist()) for a, b in spans]
        numbers = (made.rows - 100).tolist()
        assert [(n, *pair) for n, pair in zip(numbers, found, strict=True)] == expected
        named = {"cut": made.stats.rows_truncated, "drop": made.stats.dropped["too_long"]}
        assert [row - 100 for row in named.get(long, [])] == (too_long if long in named else [])


def test_results_come_in_order_and_errors_through():
    assert list(ordered_map(lambda n: n * n, 20, 3)) == [n * n for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(ordered_map(lambda n: 1 // (n - 5), 20, 3))


def test_a_process_that_is_killed_is_said():
    import os
    import signal

    with pytest.raises(UserError, match="was killed"):
        list(ordered_map(lambda n: os.kill(os.getpid(), signal.SIGKILL), 4, 2))
