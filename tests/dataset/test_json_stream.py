"""JSON texts value by value: whatever their layout, the same rows, each with its line."""

import io
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner.dataset import json_stream
from xtuner.dataset.json_stream import Found, read_values

SPLITTERS = "\u2028\u2029\x85\x1c\x1d\x1e\x0b\x0c"
"""The characters besides line ends at which ``str.splitlines`` splits."""


def read(text, **options):
    if isinstance(text, str):
        text = text.encode()
    stream = io.TextIOWrapper(io.BytesIO(text), "utf-8-sig", "surrogateescape", newline="\n")
    return list(read_values(stream, **options))


def lines_of(rows, **options):
    return "".join(json.dumps(row, ensure_ascii=False, **options) + "\n" for row in rows)


texts = st.text(st.characters(codec="utf-8"), max_size=8)
values = st.dictionaries(texts, texts | st.lists(st.integers() | texts, max_size=3), max_size=3)


@settings(deadline=None, max_examples=150)
@given(st.lists(values, max_size=6), st.sampled_from([1, 5, 64, 1 << 18]))
def test_every_layout_gives_the_same_rows(rows, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        layouts = [
            lines_of(rows),
            lines_of(rows).replace("\n", "\r\n"),
            json.dumps(rows, ensure_ascii=False),
            json.dumps(rows, indent=2),
        ]
        for text in layouts:
            found = read(text)
            assert [one.value for one in found] == rows and not any(one.why for one in found)
        assert [one.value for one in read(json.dumps({"x": 1, "d": rows}), field="d")] == rows


def test_only_a_line_feed_ends_a_line():
    rows = [{"a": f"x{character}y"} for character in SPLITTERS.replace("\x0b", "")]
    rows = [row for row in rows if row["a"][1] >= " "] + [{"a": "last"}]
    assert read(lines_of(rows)) == [Found(n, row) for n, row in enumerate(rows, 1)]


def test_control_characters_must_be_escaped_and_shift_no_line():
    text = '{"a": 1}\n{"a": "x\x0cy"}\n{"a": "x\\u000cy"}\n'
    first, broken, last = read(text)
    assert (first.line, broken.line, last) == (1, 2, Found(3, {"a": "x\x0cy"}))
    assert "Invalid control character" in broken.why


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1} {"a": 2}\n{"a": 3}\n', [(1, 1), (1, 2), (2, 3)]),
        ('{\n "a": 1\n}\n{\n "a": 2\n}\n', [(1, 1), (4, 2)]),
        ('[{"a": 1},\n{"a": 2}]\n', [(1, 1), (2, 2)]),
        ('{"a": 1,\n"b": 2}\n{"a": 3}\n', [(1, 1), (3, 3)]),
    ],
)
def test_layouts_under_the_name_jsonl(text, expected):
    found = read(text, is_jsonl=True)
    assert [(one.line, one.value["a"]) for one in found] == expected


@pytest.mark.parametrize("chunk", [4, 1 << 18])
def test_a_row_may_go_on_in_the_next_lines(monkeypatch, chunk):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    one, several = {"a": 1}, {"a": {"b": [1, {"c": "\u2028"}]}, "d": "x"}
    rows = [one, several, one, several, several, one]
    for indent in (None, 0, 2):
        texts = [json.dumps(row, indent=indent if row is several else None) for row in rows]
        found = read("\n".join(texts), is_jsonl=True)
        assert [(each.value, each.why) for each in found] == [(row, "") for row in rows]
        starts = [1 + sum(text.count("\n") + 1 for text in texts[:n]) for n in range(len(texts))]
        assert [each.line for each in found] == starts


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1}\n{"a":\n{"a": 3}\n{"a": 4}\n', {1: 1, 2: None, 3: 3, 4: 4}),
        ('{"a": 1}\n{"a": 2\n{"a": 3}\n', {1: 1, 2: None, 3: 3}),
        ('{"a": 1}\n{"a": "2\n{"a": 3}\n', {1: 1, 2: None, 3: 3}),
        ('{"a": 1}\n{"a": "x\ny"}\n{"a": 4}\n', {1: 1, 2: None, 3: None, 4: 4}),
        ('{"a": 1}\n{"a": [\n\n{"a": 4}\n', {1: 1, 2: None, 4: 4}),
        ('{"a": 1}\n{"a": 2', {1: 1, 2: None}),
        ('{"a": 1}\n{"a":\n2} {"a": 3} {"a":\n4}\n{"a": 5}\n', {1: 1, 2: 2, 3: 4, 5: 5}),
    ],
)
def test_a_row_that_is_not_completed_hides_no_other(text, found):
    values = {each.line: None if each.why else each.value["a"] for each in read(text)}
    assert values == found


def test_lines_that_are_read_ahead_stay_bounded(monkeypatch):
    monkeypatch.setattr(json_stream, "LONGEST", 1 << 10)
    rest = '{"a": 1},\n' * 1000
    found = read(f'{{"a": 0}}\n{{"a": [\n{rest}{{"a": 2}}\n')
    assert [each.line for each in found if each.why] == [2, *range(3, 1003)]
    assert found[-1] == Found(1003, {"a": 2})
    long = '{"a": "' + "x" * 3000 + '"}'
    found = read(f'{{"a": 0}}\n{{"a":\n{long}\n{{"a": 2}}\n')
    assert [(each.line, each.why[:16]) for each in found] == [
        (1, ""), (2, "Expecting value "), (3, "this row is long"), (4, "")]  # fmt: skip


def test_lists_one_a_line_are_rows_and_not_an_array():
    text = '[{"a": 1}]\n[{"a": 2}]\n'
    assert read(text) == [Found(1, [{"a": 1}]), Found(2, [{"a": 2}])]
    assert read('[{"a": 1}]\n', lines=True) == [Found(1, [{"a": 1}])]
    assert read('[{"a": 1}]\n') == [Found(1, {"a": 1})]


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        (b'{"a": 1}\n{"a": "\xff"}\n', 2, "byte 0xff is not UTF-8"),
        ('{"a": 1}\n{"a": "\u4f60\u597d\u554a"}\n'.encode("gb18030"), 2, "iconv -f GB18030"),
        (b'[{"a": 1},\n{"a": "\xff"}]', 2, "byte 0xff is not UTF-8"),
        (b'{"a": 1}\n{"a": "\\ud83d x"}\n', 2, "half of a surrogate pair"),
        (b'[{"a": 1},\n{"a": "\\uD83D x"}]', 2, "half of a surrogate pair"),
        (b'[{"a": 1}]\nmore', 2, "more text after the end"),
        (b'[{"a": 1}\n', 2, "not closed"),
    ],
)
def test_a_mistake_has_its_line_and_what_comes_before_is_read(text, line, why):
    first, mistake = read(text)
    assert first == Found(1, {"a": 1})
    assert mistake.line == line and why in mistake.why


def test_a_whole_emoji_as_two_escapes_is_a_character():
    assert read(b'{"a": "\\ud83d\\ude00"}\n') == [Found(1, {"a": "\U0001f600"})]


def test_a_key_inside_a_text_is_not_the_field():
    text = '{"note": "\\"data\\": [1]", "data": [{"a": 1},\n {"a": 2}], "more": [3]}'
    assert read(text, field="data") == [Found(1, {"a": 1}), Found(2, {"a": 2})]
    (found,) = read('{"rows": []}', field="data")
    assert "'data'" in found.why


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_a_row_without_end_is_named_in_bounded_memory(monkeypatch, layout):
    monkeypatch.setattr(json_stream, "CHUNK", 1 << 10)
    monkeypatch.setattr(json_stream, "LONGEST", 1 << 14)
    huge = '{"a": "' + "x" * (1 << 23) + '"}'
    text = f'{{"a": 1}}\n{huge}\n{{"a": 3}}\n' if layout == "lines" else f'[{{"a": 1}},\n{huge}]'
    stream = io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8", newline="\n")
    tracemalloc.start()
    try:
        found = [(one.line, one.why[:24]) for one in read_values(stream)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found[:2] == [(1, ""), (2, "this row is longer than ")]
    assert layout == "array" or found[2:] == [(3, "")]
    assert peak < 1 << 20
