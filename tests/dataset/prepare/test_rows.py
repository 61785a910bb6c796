"""Rows by number are found again in their files; files that loaders would misread are refused."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset

from xtuner.dataset import json_stream, reading
from xtuner.dataset.prepare import json_columns
from xtuner.dataset.prepare.rows import RowPlaces, load_rows
from xtuner.utils.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def source(files, path="json", **settings) -> dict:
    return dict(type=load_dataset, path=path, data_files=files, **settings)


def test_places_go_on_from_file_to_file_past_blank_lines():
    Path("a.jsonl").write_text('{"n": 0}\n\n{"n": 1}\n')
    Path("b.jsonl").write_text('{"n": 2}\n')
    places = RowPlaces(source(["a.jsonl", "b.jsonl"]))
    rows = load_rows(source(["a.jsonl", "b.jsonl"]), "train")
    assert [row["n"] for row in rows] == [0, 1, 2]
    assert [str(places(number)) for number in range(3)] == ["a.jsonl:1", "a.jsonl:3", "b.jsonl:1"]
    assert places(3) is None


def test_places_are_not_known_for_what_is_no_whole_file():
    Path("a.jsonl").write_text('{"n": 0}\n')
    assert RowPlaces(Dataset.from_list([{"n": 0}]))(0) is None
    assert RowPlaces(source("a.jsonl", split="train[:1]"))(0) is None


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
