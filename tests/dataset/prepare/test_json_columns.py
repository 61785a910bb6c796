"""Columns of several types in JSON files are loaded as they are written, or not at all."""

from __future__ import annotations

import json

import pytest
from datasets import load_dataset

from xtuner.dataset.prepare import json_columns
from xtuner.dataset.prepare.rows import load_rows
from xtuner.dataset.reading import read_rows

TEXT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, TEXT[1]]
CALLS = [TEXT[0], {**TEXT[1], "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}]

FILES = {
    "text, then text and lists": [[TEXT] * 3, [TEXT, PARTS, TEXT]],
    "text and lists, then text": [[TEXT, PARTS], [TEXT] * 2],
    "text, then only lists": [[TEXT], [PARTS] * 2],
    "another structure in the second file": [[TEXT], [CALLS, TEXT]],
    "a number, then a text and nothing": [[3], ["a", None]],
    "texts that are JSON beside parts": [
        [[{"role": "user", "content": "null"}, {"role": "assistant", "content": "1.50"}], PARTS],
        [[{"role": "user", "content": "true"}, {"role": "assistant", "content": "{}"}]],
    ],
    "a number beside texts that are JSON": [[3, "true", "null", '{"a": 1}', '"q"', "1.50"]],
    "a text, then a list": [["a"], [["a", "b"], "c"]],
}


def plain(value):
    """Without the fields that Arrow fills with None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    return [plain(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
def test_files_of_different_types_are_read_as_written(files, tmp_path):
    names = [tmp_path / f"{number}.jsonl" for number in range(len(files))]
    for name, values in zip(names, files, strict=True):
        name.write_text("".join(json.dumps({"messages": value}) + "\n" for value in values))
    source = dict(type=load_dataset, path="json", data_files=[str(name) for name in names])
    rows = load_rows(source, "train")
    assert [plain(row["messages"]) for row in rows] == [v for values in files for v in values]


def test_the_doctor_reads_parquet_files_with_json_as_training_does(tmp_path):
    file, parquet = tmp_path / "a.jsonl", str(tmp_path / "a.parquet")
    file.write_text("".join(json.dumps({"messages": value}) + "\n" for value in (TEXT, PARTS)))
    source = dict(type=load_dataset, path="json", data_files=str(file))
    load_rows(source, "train").to_parquet(parquet)
    rows = [row.value for row in read_rows(parquet)]
    assert [plain(row["messages"]) for row in rows] == [TEXT, PARTS]
    trained = load_rows(dict(type=load_dataset, path="parquet", data_files=parquet), "train")
    assert rows == list(trained)


def test_later_blocks_of_one_file_are_read_as_written(tmp_path):
    file = tmp_path / "a.jsonl"
    rows = [*[{"messages": TEXT}] * 400, {"messages": PARTS}, {"messages": TEXT}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = dict(type=load_dataset, path="json", data_files=str(file), chunksize=20_000)
    assert load_dataset("json", data_files=str(file), chunksize=20_000)["train"][-1] != rows[-1]
    loaded = load_rows(source, "train")
    assert [plain(row) for row in loaded] == rows


def test_quoted_texts_of_the_users_own_stay(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    rows = [{"a": '"Quoted."', "b": ['{"x": 1}']}] * 5
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(json_columns, "json_features", lambda files: pytest.fail("loaded again"))
    loaded = load_rows(dict(type=load_dataset, path="json", data_files=str(file)), "train")
    assert list(loaded) == rows
