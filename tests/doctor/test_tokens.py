"""Lengths, cuts, trained tokens and stop tokens of encoded rows."""

from __future__ import annotations

import random

import numpy as np

from xtuner.doctor.findings import Findings, Place
from xtuner.doctor.tokens import Bar, Encoded, TokenFacts, histogram, measure

STOP = 9


def encoded(rows: list[list[int]], start: int) -> Encoded:
    """Rows of labels as flat arrays."""
    lengths = np.array([len(row) for row in rows])
    return Encoded(
        np.array([label for row in rows for label in row]),
        lengths,
        np.arange(start, start + len(rows)),
    )


def measured(labels: list[list[int]], max_length: int = 6) -> tuple[TokenFacts, dict]:
    facts, findings = TokenFacts(), Findings()
    batches = (encoded(labels[start : start + 3], start) for start in range(0, len(labels), 3))
    measure(
        batches,
        facts,
        max_length=max_length,
        stop_ids={STOP},
        place=lambda number: Place("data.jsonl", number + 1),
        findings=findings,
    )
    return facts, {one.code: [place.line for place in one.places] for one in findings}


def test_good_rows_are_counted():
    facts, found = measured([[-100, 1, STOP], [-100, 1, STOP, -100, 2, STOP]])
    assert found == {}
    assert (facts.tokens, facts.trained, facts.lost, facts.median) == (9, 6, 0, 6)


def test_each_trouble_is_found_in_its_row():
    rows = [
        [-100, 1, STOP],
        [-100, 1, 2],
        [-100, 1, STOP, -100, 2, -100],
        [-100] * 4 + [1, 2, STOP],
        [-100] * 7 + [STOP],
        [-100] * 3,
        [-100, *[1] * 60, STOP],
    ]
    facts, found = measured(rows)
    assert found == {
        "no-stop": [2, 3],
        "cut": [4, 5, 7],
        "no-supervised-token": [5, 6],
        "very-long": [7],
    }
    assert facts.lost == 1 + 2 + 56
    assert facts.trained == 2 + 2 + 3 + 2 + 0 + 0 + 5


def test_a_newline_trained_after_the_stop_token_is_fine():
    assert measured([[-100, 1, STOP, 3]])[1] == {}


def test_histogram_has_boundaries_at_powers_of_two():
    assert histogram([1, 2, 3, 9]) == [Bar(1, 2, 1), Bar(2, 4, 2), Bar(4, 8, 0), Bar(8, 16, 1)]
    assert histogram([]) == []


def test_whatever_the_batches_each_row_is_judged_by_itself():
    """Against the definition, a row at a time."""

    def unstopped(row: list[int]) -> bool:
        text = "".join("_" if x == -100 else "S" if x == STOP else "x" for x in row)
        return any("S" not in span[-3:] for span in text.split("_") if span)

    draw = random.Random(0)
    rows = [
        [draw.choice((-100, -100, 1, 7, STOP)) for _ in range(draw.randint(0, 8))]
        for _ in range(300)
    ]
    facts, findings = TokenFacts(), Findings()
    measure(
        (encoded(rows[start : start + 50], start) for start in range(0, 300, 50)),
        facts,
        max_length=6,
        stop_ids={STOP},
        place=lambda number: Place("data.jsonl", number + 1),
        findings=findings,
        empty_thoughts=[[7, 1], [7, 7, 1]],
    )
    trained = [sum(label != -100 for label in row[:6]) for row in rows]
    expected = {
        "cut": [len(row) > 6 for row in rows],
        "no-stop": [
            len(row) <= 6 and any(label != -100 for label in row) and unstopped(row) for row in rows
        ],
        "no-supervised-token": [not count for count in trained],
        "empty-think": [",7,1," in f",{','.join(map(str, row))}," for row in rows],
    }
    assert {one.code: one.count for one in findings} == {
        code: sum(flags) for code, flags in expected.items()
    }
    for one in findings:
        first = [number + 1 for number, is_so in enumerate(expected[one.code]) if is_so]
        assert [place.line for place in one.places] == first[: len(one.places)]
    assert facts.trained == sum(trained)
