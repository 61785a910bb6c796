"""The scan of whole parts: what is counted, which layout is recommended, copies across files."""

import json

import pytest

from xtuner.dataset.file_sections import DataFiles
from xtuner.dataset.reading import Row, Unreadable
from xtuner.doctor.layouts import AUTO, BY_MAP_FN, LAYOUTS
from xtuner.doctor.report import Report
from xtuner.doctor.scan import Part, scan

ALPACA = {"instruction": "i", "input": "", "output": "o"}
TURNS = {"conversation": [{"input": "q", "output": "a"}]}


def part(*values, name="a.jsonl", **settings):
    rows = [
        value if isinstance(value, Unreadable) else Row(name, number, value)
        for number, value in enumerate(values, 1)
    ]
    return Part(name, lambda: iter(rows), **settings)


def found(result):
    return {one.code: [(place.file, place.line) for place in one.places] for one in result.findings}


def test_rows_are_counted_and_unreadable_ones_are_none():
    result = scan([part(TURNS, Unreadable("a.jsonl", 2, "why"), {"conversation": []})])
    assert (result.rows, result.good, result.files) == (2, 1, ["a.jsonl"])
    assert found(result) == {"bad-json": [("a.jsonl", 2)], "no-answer": [("a.jsonl", 3)]}


def test_a_copy_names_the_row_that_it_repeats_in_another_file():
    other = {"conversation": [{"input": "q", "output": "b"}]}
    result = scan([part(TURNS, other), part(other, name="b.jsonl")])
    (finding,) = result.findings
    assert (finding.code, str(finding.places[0])) == ("duplicate", "b.jsonl:1")
    assert "a.jsonl:2" in finding.places[0].detail


def test_the_map_function_is_wrong_where_most_rows_are_of_another_layout():
    layout = BY_MAP_FN["openai_map_fn"]
    result = scan([part(ALPACA, {**ALPACA, "output": "p"}, layout=layout)])
    (finding,) = result.findings
    assert (finding.code, finding.count) == ("wrong-map-fn", 2)
    assert "dataset_map_fn=alpaca_map_fn" in finding.paste
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    again = {"messages": [*chat["messages"][:1], {"role": "assistant", "content": "b"}]}
    assert set(found(scan([part(chat, again, ALPACA, layout=layout)]))) == {"mixed-layouts"}


def test_auto_counts_the_layouts_it_finds():
    result = scan([part(TURNS, ALPACA, {"foo": 1}, layout=AUTO)])
    assert result.layouts == {"xtuner": 1, "alpaca": 1}
    assert found(result) == {"missing-field": [("a.jsonl", 3)]}


def test_a_map_function_of_the_users_own_is_judged_by_what_it_returns():
    def mapped(row):
        return {"conversation": [{"input": row["q"], "output": row.get("a")}]}

    rows = [{"q": "x", "a": "y"}, {"a": "y"}, {"q": "x"}]
    result = scan([part(*rows, map_fn=mapped, layout=None)])
    assert found(result) == {"missing-field": [("a.jsonl", 2)], "wrong-type": [("a.jsonl", 3)]}
    assert result.good == 1


def test_none_for_a_switch_is_not_given():
    turn = {"input": "q", "output": "a", "output_with_loss": None, "need_eos_token": None}
    message = {"role": "assistant", "content": "a", "loss": None}
    chat = {"messages": [{"role": "user", "content": "q"}, message]}
    assert not found(scan([part({"conversation": [turn]})]))
    assert not found(scan([part(chat, layout=LAYOUTS["openai"])]))


def test_a_part_without_rows_and_rows_that_are_no_objects():
    assert found(scan([part()])) == {"no-rows": [("a.jsonl", 1)]}
    assert found(scan([part(["x"], TURNS)])) == {"not-an-object": [("a.jsonl", 1)]}


@pytest.mark.parametrize("layout", [BY_MAP_FN["openai_map_fn"], AUTO, None])
def test_sections_of_a_file_give_what_the_whole_file_gives(tmp_path, monkeypatch, layout):
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    bad = [
        '{"messages": [',
        json.dumps(chat, indent=1),
        '{\n"x":\n1',
        "[1]",
        '{"messages": 5}',
        '{"x": "\\ud800"}',
        "",
        '{"messages": []}',
    ]
    lines = [json.dumps(row) for row in (chat, ALPACA, TURNS, {**chat, "n": 1}, {**chat, "n": "x"})]
    file = tmp_path / "a.jsonl"
    text = "\ufeff" + "\n".join([*lines, *bad, *lines, *bad[:3], lines[1]] * 4)
    file.write_bytes(text.encode() + "\n中文".encode("gbk"))
    rows = DataFiles([str(file)])
    monkeypatch.setattr("xtuner.doctor.scan.usable_processes", lambda wanted: wanted)

    def examined(processes, size):
        monkeypatch.setattr("xtuner.dataset.file_sections.SECTION", size)
        map_fn = (lambda row: {"conversation": row["conversation"]}) if layout is None else None
        result = scan([Part("a", rows, map_fn, layout)], processes)
        report = Report("c.py", result, None, "", "").as_dict()
        return report, result.map_fns

    whole = examined(1, 1 << 24)
    assert len(rows.sections()) == 1
    assert whole[0]["rows"] > 40 and len(whole[0]["findings"]) > 3
    for processes in (1, 2):
        assert examined(processes, 200) == whole
        assert len(rows.sections()) > 5
