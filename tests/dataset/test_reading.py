"""Raw rows of every kind of file, in spite of broken ones, wherever the window ends."""

from __future__ import annotations

import json
import random

import pytest

from xtuner.dataset import reading
from xtuner.dataset.reading import Row, Unreadable, find_files, read_rows
from xtuner.utils.errors import UserError


def places(file) -> list[tuple[str, int]]:
    return [("row" if isinstance(row, Row) else "bad", row.line) for row in read_rows(str(file))]


@pytest.mark.parametrize("window", [1, 7, 64, 1 << 18])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_reads_the_same_whatever_the_window(tmp_path, monkeypatch, window, indent):
    monkeypatch.setattr(reading, "CHUNK", window)
    rng = random.Random(3)
    rows = [{"a": 'é\n"x" {' * rng.randint(0, 9), "b": [{"c": number}]} for number in range(20)]
    file = tmp_path / "data.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    file.write_text(text, "utf-8")
    read = [row for row in read_rows(str(file)) if isinstance(row, Row)]
    assert [row.value for row in read] == rows
    lines = text.splitlines()
    starts = [n for n, line in enumerate(lines, 1) if line == "  {"] if indent else [1] * 20
    assert [row.line for row in read] == starts


@pytest.mark.parametrize("window", [7, 1 << 18])
def test_reading_goes_on_after_a_broken_row_of_an_array(tmp_path, monkeypatch, window):
    monkeypatch.setattr(reading, "CHUNK", window)
    rows = [{"a": number, "b": [{"c": "x" * 90}]} for number in range(4)]
    text = json.dumps(rows, indent=1).replace('"a": 1,', '"a": 1')
    file = tmp_path / "data.json"
    file.write_text(text)
    assert places(file) == [("row", 2), ("bad", 12), ("row", 18), ("row", 26)]


def test_lines_of_a_file_with_windows_line_ends_and_a_mark(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n')
    assert places(file) == [("row", 1), ("row", 3)]


def test_json_lines_under_the_name_json(tmp_path):
    file = tmp_path / "data.json"
    file.write_text('{"a": 1}\n{"a": }\n{"a": 3}\n')
    assert places(file) == [("row", 1), ("bad", 2), ("row", 3)]


@pytest.mark.parametrize("name", ["data.parquet", "data.arrow", "data.jsonl.gz"])
def test_a_file_that_is_not_what_its_name_says(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(b"hello hello")
    (row,) = read_rows(str(file))
    assert isinstance(row, Unreadable)
    assert row.line == 1


def test_both_kinds_of_arrow_files(tmp_path):
    import pyarrow as pa

    table = pa.table({"a": [1, 2]})
    for writer, name in ((pa.ipc.new_stream, "stream.arrow"), (pa.ipc.new_file, "file.arrow")):
        with writer(str(tmp_path / name), table.schema) as out:
            out.write_table(table)
        assert [row.value for row in read_rows(str(tmp_path / name))] == [{"a": 1}, {"a": 2}]


def test_folders_and_globs(tmp_path):
    for name in ("b.jsonl", "a.json", "notes.md", "sub/c.csv.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [file.removeprefix(f"{tmp_path}/") for file in find_files([str(tmp_path)])]
    assert names == ["a.json", "b.jsonl", "sub/c.csv.gz"]
    assert find_files([f"{tmp_path}/*.jsonl"]) == [f"{tmp_path}/b.jsonl"]
    with pytest.raises(UserError, match="there is no data file"):
        find_files([str(tmp_path / "none.json")])
