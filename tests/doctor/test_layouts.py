"""Which layout a row has, by its fields and their kinds."""

import pytest

from xtuner.dataset import map_fns
from xtuner.dataset.map_fns import DATASET_FORMAT_MAPPING
from xtuner.doctor.layouts import BY_MAP_FN, LAYOUTS, kind_problem, messages_of, named, recognise

CHAT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"conversation": [{"input": "q", "output": "a"}]}, "xtuner"),
        ({"instruction": "i", "input": "", "output": "o", "id": 1}, "alpaca"),
        ({"conversations": CHAT}, "wizardlm"),
        ({"conversations": CHAT, "image": "a.png"}, "llava"),
        ({"text": "### Human: q### Assistant: a"}, "oasst1"),
        ({"text": "words"}, "pretrain"),
        ({"prompt": [], "chosen": [], "rejected": []}, "preference"),
        ({"conversations": [{"speaker": "x"}]}, None),
        ({"foo": 1}, None),
    ],
)
def test_rows_are_recognised(row, name):
    found = recognise(row)
    assert (found and found.name) == name


def test_every_map_function_has_its_layout():
    assert {layout.name for layout in LAYOUTS.values() if layout.map_fn} >= set(
        DATASET_FORMAT_MAPPING
    )
    for name, layout in BY_MAP_FN.items():
        assert layout.preference or callable(getattr(map_fns, name))


def test_kinds_in_words():
    assert kind_problem("x", "text") is None
    assert kind_problem(None, "text") == ("null", "text")
    assert kind_problem([5], "messages") == ("[0]: number", "object")
    assert kind_problem([{"foo": 1}], "messages") == ("[0]: foo", "'role'")
    assert [named(value) for value in (True, 1.5, {})] == ["true/false", "number", "object"]


def test_messages_in_any_spelling():
    spelt = [{"from": "a", "value": 1}, {"role": "b", "text": 2}, {"from": "c", "content": 3}, {}]
    assert list(messages_of(spelt)) == [("a", 1), ("b", 2), ("c", 3), ("", None)]
