"""What a file was read as tells the argument that its loader lacks."""

from __future__ import annotations

import pytest

from xtuner.dataset.sources import loader_hint

ROW = {"messages": []}


@pytest.mark.parametrize(
    ("row", "argument"),
    [
        ({"data": [ROW]}, "field='data'"),
        ({"version": 1, "data": [ROW, ROW]}, "field='data'"),
        ({"rows": [{"any": 1}]}, "field='rows'"),
        ({"a;b;c": "1;2;3"}, "sep=';'"),
        ({"a\tb": "1\t2"}, "sep='\\t'"),
    ],
)
def test_the_argument_of_the_loader(row, argument):
    assert f"load_dataset(..., {argument})" in loader_hint(row)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"text": "a;b"},
        {"messages": [{"role": "user", "content": "q"}]},
        {"instruction": "q", "tools": [{"name": "f"}]},
        {"version": 1, "data": [{"any": 1}]},
        {"a": [ROW], "b": [ROW]},
        {"data": []},
        {"data": [ROW, 1]},
    ],
)
def test_rows_of_their_own(row):
    assert loader_hint(row) == ""
