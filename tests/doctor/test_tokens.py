"""Lengths, cuts, trained tokens and stop tokens of encoded rows."""

from __future__ import annotations

from xtuner.doctor.findings import Findings, Place
from xtuner.doctor.tokens import Bar, TokenFacts, histogram, measure

STOP = 9


def measured(labels: list[list[int]], max_length: int = 6) -> tuple[TokenFacts, dict]:
    facts, findings = TokenFacts(), Findings()
    rows = ({"labels": row, "rows": [number]} for number, row in enumerate(labels))
    measure(
        rows,
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


def test_histogram_has_borders_at_powers_of_two():
    assert histogram([1, 2, 3, 9]) == [Bar(1, 2, 1), Bar(2, 4, 2), Bar(4, 8, 0), Bar(8, 16, 1)]
    assert histogram([]) == []
