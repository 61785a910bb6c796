"""Rows by number are found again in their files; files that loaders would misread are refused."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset

from xtuner.dataset import json_stream, process_hf_dataset, reading
from xtuner.dataset.prepare import json_columns
from xtuner.dataset.prepare.rows import RowPlaces, load_rows, load_usable_rows
from xtuner.doctor.parts import find_parts
from xtuner.utils.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def source(files, path="json", **settings) -> dict:
    return dict(type=load_dataset, path=path, data_files=files, **settings)


def test_places_go_on_from_file_to_file_past_blank_lines():
    Path("a.jsonl").write_text('{"n": 0}\n\n{"n": 1}\n')
    Path("b.jsonl").write_text('{"n": 2}\n')
    places = RowPlaces(source(["a.jsonl", "b.jsonl"]), "train")
    rows = load_rows(source(["a.jsonl", "b.jsonl"]), "train")
    assert [row["n"] for row in rows] == [0, 1, 2]
    assert [str(places(number)) for number in range(3)] == ["a.jsonl:1", "a.jsonl:3", "b.jsonl:1"]
    assert places(3) is None


def test_places_are_not_known_for_what_is_no_file():
    assert RowPlaces(Dataset.from_list([{"n": 0}]), "train")(0) is None
    assert RowPlaces(source("a.jsonl", split="other"), "train")(0) is None


MIXED = [{"t": "true"}, {"t": ["a"]}, {"t": "1.50"}, {"t": None, "n": 1}, {"t": '"q"', "n": "x"}]
"""Where ``datasets`` keeps these as JSON, the first row is a switch, the third is 1.5."""


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train", [0, 1, 2, 3, 4]),
        ("train[:3]", [0, 1, 2]),
        ("train[1:]", [1, 2, 3, 4]),
        ("train[-2:]", [3, 4]),
        ("train[40%:80%]", [2, 3]),
        ("validation", [5, 6]),
        ("train[:1]+validation[1:]", [0, 6]),
        ("validation+train", [5, 6, 0, 1, 2, 3, 4]),
        ("all", [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_slices_of_mixed_files_have_the_texts_of_the_files(split, numbers):
    rows = [*MIXED, {"t": "false"}, {"t": {"a": 1}}]
    lines = [json.dumps(row) + "\n" for row in rows]
    for name, part in (("a", lines[:2]), ("b", lines[2:5]), ("v", lines[5:])):
        Path(f"{name}.jsonl").write_text("".join(part))
    files = dict(train=["a.jsonl", "b.jsonl"], validation="v.jsonl")
    loader = source(files, split=split)
    loaded = load_rows(loader, "train")
    kept = [{key: row[key] for key in row if row[key] is not None} for row in loaded]
    assert kept == [{key: rows[n][key] for key in rows[n] if rows[n][key] is not None}
                    for n in numbers]  # fmt: skip
    (part,) = find_parts(dict(type=process_hf_dataset, dataset=loader))
    assert [row.value for row in part.rows()] == [rows[number] for number in numbers]
    places = RowPlaces(loader, "train")
    names = ["a:1", "a:2", "b:1", "b:2", "b:3", "v:1", "v:2"]
    found = [str(places(index)).replace(".jsonl", "") for index in range(len(numbers))]
    assert found == [names[number] for number in numbers]


def test_a_slice_of_rows_that_can_be_used():
    Path("a.jsonl").write_text('{"n": 0}\nbroken\n{"n": 1}\n5\n{"n": 2}\n')
    loader = source("a.jsonl", split="train[1:]")
    with pytest.raises(UserError, match=r"a\.jsonl:2: "):
        load_rows(loader, "train")
    rows, places, stats = load_usable_rows(loader, "train", "drop")
    assert rows["n"][:] == [1, 2]
    assert [str(places(number)) for number in (0, 1)] == ["a.jsonl:3", "a.jsonl:5"]
    assert stats.dropped == {"unreadable": [2, 4]}


@pytest.mark.parametrize("split", ["train[:2", "train[a:]", "train[:2](nearest)"])
def test_a_slice_that_is_no_slice_is_named(split):
    Path("a.jsonl").write_text('{"n": 0}\n')
    with pytest.raises(UserError, match=r"the split .* cannot be read: "):
        load_rows(source("a.jsonl", split=split), "train")


def test_a_fault_in_a_split_that_is_not_read_ends_no_run():
    Path("a.jsonl").write_text('{"n": 0}\n')
    Path("v.jsonl").write_text("broken\n")
    files = dict(train="a.jsonl", validation="v.jsonl")
    assert load_rows(source(files), "train")["n"][:] == [0]
    with pytest.raises(UserError, match=r"v\.jsonl:1: "):
        load_rows(source(files), "validation")


ROW = '{"a": "x", "b": ["c"]}'


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.json", f'[{ROW},\n{{"a": "x\ny"}}]', 2),  # ujson takes it
        ("a.json", f'[{ROW},\n{{"a": "x\ty"}}]', 2),
        ("a.json", '{\n"a": "x\ty", "b": [{"c": 1}, {"c": 2}]}', 2),  # so does pandas
        ("a.json", f'[{ROW}, {{"a": 007}}]', 1),
        ("a.jsonl", f'{ROW}\n{{"a": 007}}\n{ROW}\n', 2),  # was left out without a word
        ("a.jsonl", f'{ROW}\n{{"a": 1}}\n{{"a": "x\ty"}}\n', 3),
        ("a.jsonl", f'{ROW}\n{{"a": 1}}\n{{"a": "x\n"}}\n', 3),
    ],
)
def test_what_is_no_json_is_named_whatever_datasets_makes_of_it(name, text, line):
    Path(name).write_text(text)
    with pytest.raises(UserError, match=rf"a\.jsonl?:{line}: this data cannot be read"):
        load_rows(source(name), "train")


@pytest.mark.parametrize("text", ["{}\n", "{}\n{}\n", "[{}, {}]"])
def test_rows_without_fields_are_named(text):
    Path("a.jsonl").write_text(text)
    with pytest.raises(UserError, match="no row has a field"):
        load_rows(source("a.jsonl"), "train")


def test_a_csv_line_with_too_many_columns_is_refused_not_shifted():
    Path("a.csv").write_text("a,b\n1,2\n3,4,5\n")
    with pytest.raises(UserError, match=r"a\.csv:3: .*3 columns where the header has 2"):
        load_rows(source("a.csv", "csv"), "train")


def test_cells_of_csv_files_are_read_as_texts_for_functions_that_read_texts():
    Path("a.csv").write_text("n,word\n007,NA\n1.50,\n", "utf-8")
    rows = load_rows(source("a.csv", "csv"), "train", as_text=True)
    assert list(rows) == [{"n": "007", "word": "NA"}, {"n": "1.50", "word": ""}]
    assert load_rows(source("a.csv", "csv"), "train")["n"][:] == [7.0, 1.5]


def test_a_row_that_is_too_long_is_named_before_datasets_reads_it(monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", 1 << 10)
    monkeypatch.setattr(json_stream, "LONGEST", 1 << 12)
    monkeypatch.setattr(reading, "LONGEST", 1 << 12)
    monkeypatch.setattr(json_columns, "LONGEST", 1 << 12)
    monkeypatch.setattr(json_columns, "BLOCK", 1 << 10)
    ok, long = json.dumps({"text": "a"}), json.dumps({"text": "a" * (1 << 13)})
    for name, text, loader in (
        ("a.jsonl", f"{ok}\n{long}\n", "json"),
        ("a.json", f"[{ok},\n{long}]", "json"),
        ("a.txt", f"a\n{long}\n", "text"),
    ):
        Path(name).write_text(text, "utf-8")
        with pytest.raises(UserError, match=rf"{name}:2: .*longer than 4,096 characters"):
            load_rows(source(name, loader), "train")
    Path("a.json").write_text("[" + ",".join([ok] * 1000) + "]")  # rows on one line
    assert len(load_rows(source("a.json"), "train")) == 1000


def test_a_row_that_is_no_object_is_named():
    Path("a.jsonl").write_text('{"n": 0}\n"text"\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: .*not an object"):
        load_rows(source("a.jsonl"), "train")


def test_an_unknown_split_lists_those_that_are_there():
    Path("a.jsonl").write_text('{"n": 0}\n')
    with pytest.raises(UserError, match="no split 'test'") as caught:
        load_rows(source("a.jsonl"), "test")
    assert caught.value.hint == "train"


@pytest.mark.parametrize("inner", [True, False])
def test_a_full_disk_is_not_the_fault_of_the_rows(inner):
    full = OSError(errno.ENOSPC, "No space left on device")

    def load():
        if inner:
            raise ValueError("An error occurred while generating the dataset") from full
        raise full

    with pytest.raises(UserError, match="the cache of datasets cannot be written: No space left"):
        load_rows({"type": load}, None)
