"""The doctor finds each of a hundred faults with its line, and nothing in a hundred good files."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from tests.doctor.corpus import FAULTS, as_jsonl, good_rows
from xtuner.dataset.reading import read_rows
from xtuner.doctor.layouts import AUTO, LAYOUTS, Layout
from xtuner.doctor.scan import Part, Scan, scan


def examine(file: Path, layout: Layout) -> Scan:
    return scan([Part(str(file), lambda: read_rows(str(file)), layout=layout)])


def test_there_are_a_hundred_faults():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 100


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_found_with_its_line(tmp_path, fault):
    file = tmp_path / f"data{fault.suffix}"
    file.write_text(fault.text, "utf-8")
    found = {finding.code: finding for finding in examine(file, fault.layout).findings}
    assert set(found) == {fault.code}
    assert found[fault.code].places[0].line == fault.line
    assert found[fault.code].places[0].file == str(file)


NAMES = [name for name in LAYOUTS if name not in ("msagent_react",)]


@pytest.mark.parametrize("name", NAMES)
def test_good_files_raise_no_alarm(tmp_path, name):
    """Five files of each layout: JSON lines, an array on one line, an indented one, gz, parquet."""
    for seed, kind in enumerate(("jsonl", "line", "indented", "gz", "parquet")):
        rows = good_rows(name, 9, seed=seed)
        file = write(tmp_path, kind, rows)
        result = examine(file, LAYOUTS[name])
        assert not [(one.code, one.places) for one in result.findings], kind
        assert result.good == result.rows == 9


def write(folder: Path, kind: str, rows: list[dict]) -> Path:
    if kind == "jsonl":
        file = folder / "data.jsonl"
        file.write_text(as_jsonl(rows), "utf-8")
    elif kind in ("line", "indented"):
        file = folder / f"{kind}.json"
        file.write_text(json.dumps(rows, indent=2 if kind == "indented" else None), "utf-8")
    elif kind == "gz":
        file = folder / "data.jsonl.gz"
        file.write_bytes(gzip.compress(as_jsonl(rows).encode()))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = folder / "data.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def test_good_csv(tmp_path):
    file = tmp_path / "data.csv"
    rows = good_rows("alpaca", 5, seed=4)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["instruction", "input", "output"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    result = examine(file, LAYOUTS["alpaca"])
    assert not list(result.findings)
    assert result.rows == 5


def test_wrong_map_function_is_named_with_the_lines_to_paste(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(as_jsonl(good_rows("openai", 3, seed=5)), "utf-8")
    (finding,) = examine(file, LAYOUTS["alpaca"]).findings
    assert finding.count == 3
    assert finding.paste == (
        "from xtuner.dataset.map_fns import openai_map_fn\ndataset_map_fn=openai_map_fn\n"
    )


def test_the_users_own_map_function_is_run(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"q": "a", "a": "b"}\n{"q": "c"}\n{"q": "d", "a": ""}\n', "utf-8")

    def own(row):
        return {"conversation": [{"input": row["q"], "output": row["a"]}]}

    result = scan([Part("own", lambda: read_rows(str(file)), own, None)])
    found = {finding.code: finding.places[0] for finding in result.findings}
    assert {code: place.line for code, place in found.items()} == {
        "missing-field": 2,
        "empty-answer": 3,
    }
    assert found["missing-field"].detail == "'a'"


def test_a_field_of_two_types_is_noted_for_the_users_own_map_function(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"q": "a", "n": 1}\n{"q": "b", "n": "two"}\n{"q": "c", "n": 3.5}\n')

    def own(row):
        return {"conversation": [{"input": row["q"], "output": str(row["n"])}]}

    (finding,) = scan([Part("own", lambda: read_rows(str(file)), own, None)]).findings
    assert (finding.code, finding.count, finding.places[0].line) == ("mixed-types", 1, 2)


def test_the_users_own_map_function_that_returns_something_else(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"q": "a"}\n')
    result = scan([Part("own", lambda: read_rows(str(file)), lambda row: [row["q"]], None)])
    assert [finding.code for finding in result.findings] == ["map-fn-failed"]


def test_auto_takes_each_row_as_it_is(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = good_rows("alpaca", 2, seed=6) + good_rows("openai", 3, seed=6)
    file.write_text(as_jsonl([*rows, {"x": 1}]), "utf-8")
    result = examine(file, AUTO)
    assert result.layouts == {"alpaca": 2, "openai": 3}
    assert [(one.code, one.places[0].line) for one in result.findings] == [("missing-field", 6)]


def test_auto_knows_the_roles_that_its_map_function_knows(tmp_path):
    messages = [("human", "q"), ("function_call", "{}"), ("observation", "2"), ("gpt", "a")]
    rows = [{"conversations": [{"from": who, "value": text} for who, text in messages]}]
    file = write(tmp_path, "jsonl", rows)
    assert not list(examine(file, AUTO).findings)
    assert "bad-role" in examine(file, LAYOUTS["wizardlm"]).findings
