"""Raw rows of every kind of file, in spite of broken ones, wherever the window ends."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
from pathlib import Path

import pytest
from datasets import load_dataset

from xtuner.dataset import json_stream
from xtuner.dataset.file_sections import divide
from xtuner.dataset.json_file import BrokenRow, read_json_rows
from xtuner.dataset.preference_dataset import load_jsonl_dataset
from xtuner.dataset.prepare.rows import load_rows
from xtuner.dataset.reading import Row, Unreadable, find_files, read_rows, require_rows
from xtuner.dataset.sources import local_files
from xtuner.utils.errors import UserError


def places(file) -> list[tuple[str, int]]:
    return [("row" if isinstance(row, Row) else "bad", row.line) for row in read_rows(str(file))]


@pytest.mark.parametrize("window", [1, 7, 64, 1 << 18])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_reads_the_same_whatever_the_window(tmp_path, monkeypatch, window, indent):
    monkeypatch.setattr(json_stream, "CHUNK", window)
    rng = random.Random(3)
    rows = [{"a": 'é\n"x" {' * rng.randint(0, 9), "b": [{"c": number}]} for number in range(20)]
    file = tmp_path / "data.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    file.write_text(text, "utf-8")
    read = [row for row in read_rows(str(file)) if isinstance(row, Row)]
    assert [row.value for row in read] == rows
    lines = text.split("\n")
    starts = [n for n, line in enumerate(lines, 1) if line == "  {"] if indent else [1] * 20
    assert [row.line for row in read] == starts


@pytest.mark.parametrize("window", [7, 1 << 18])
def test_reading_goes_on_after_a_broken_row_of_an_array(tmp_path, monkeypatch, window):
    monkeypatch.setattr(json_stream, "CHUNK", window)
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


SPLITTERS = "\u2028 \u2029 \x85"
"""Characters that JSON texts may hold raw and at which ``str.splitlines`` splits."""


def test_training_and_the_doctor_read_the_same_rows(tmp_path):
    rows = [{"a": f"{SPLITTERS} {number}"} for number in range(3)]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    assert list(read_rows(str(file))) == [Row(str(file), n, row) for n, row in enumerate(rows, 1)]
    assert read_json_rows(file) == read_json_rows(file, keep_broken=True) == rows
    assert load_jsonl_dataset(str(file)).to_list() == rows
    source = dict(type=load_dataset, path="json", data_files=str(file), split="train")
    assert load_rows(source, "train").to_list() == rows


def test_a_broken_row_keeps_its_place(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"a": "\u2028"}\n{"a": }\n{"a": 3}\n', "utf-8")
    first, broken, last = read_json_rows(file, keep_broken=True)
    assert (first, last) == ({"a": "\u2028"}, {"a": 3})
    assert isinstance(broken, BrokenRow) and "line 2" in broken.why
    with pytest.raises(UserError) as caught:
        read_json_rows(file)
    assert caught.value.where.line == 2
    with pytest.raises(UserError, match="cannot be read"):
        list(require_rows(str(tmp_path)))


GBK = '{"a": "\u4f60\u597d"}\n'.encode("gbk")


@pytest.mark.parametrize(
    ("name", "content", "line", "why"),
    [
        ("trailing.jsonl", b'{"a": 1}\n{"a": 2,}\n', 2, "property name"),
        ("quotes.jsonl", b"{'a': 1}\n", 1, "property name"),
        ("surrogate.jsonl", b'{"a": "b"}\n{"a": "\\ud83d"}\n', 2, "surrogate"),
        ("gbk.jsonl", GBK, 1, "GBK"),
        ("utf16.jsonl", '{"a": "b"}\n'.encode("utf-16"), 1, "UTF-16"),
        ("empty.jsonl", b"", None, "no rows"),
        ("gz.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], 1, "ended"),
    ],
)
def test_where_loading_fails_the_line_is_named(tmp_path, name, content, line, why):
    file = tmp_path / name
    file.write_bytes(content)
    source = dict(type=load_dataset, path="json", data_files=str(file), split="train")
    with pytest.raises(UserError, match=why) as caught:
        load_rows(source, "train")
    assert (caught.value.where.file, caught.value.where.line) == (str(file), line)


WORKBOOK = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


@pytest.mark.parametrize(
    ("name", "head"), [("a.xlsx", b"PK\x03\x04"), ("a.xls", WORKBOOK), ("a.csv", WORKBOOK)]
)
def test_an_excel_workbook_is_named(tmp_path, name, head):
    (tmp_path / name).write_bytes(head + bytes(20))
    (found,) = read_rows(str(tmp_path / name))
    assert isinstance(found, Unreadable) and "save the table as CSV" in found.why


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_header_tells_what_separates_columns(tmp_path, separator):
    file = tmp_path / "rows.csv"
    file.write_text(f"a{separator}b\n'1, 2'{separator}3\n".replace("'", '"'))
    assert [row.value for row in read_rows(str(file))] == [{"a": "1, 2", "b": "3"}]


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert find_files(["~/rows.jsonl"]) == [str(tmp_path / "rows.jsonl")]


@pytest.mark.parametrize("name", ["x.csv", "x.txt", "x.parquet"])
def test_a_file_of_another_format_is_named_with_its_loader(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(b"a,b\n1,2\n")
    with pytest.raises(UserError, match="cannot read a") as caught:
        load_rows(dict(type=load_dataset, path="json", data_files=str(file)), "train")
    assert "path='" in caught.value.hint


def test_patterns_and_folders_without_files_are_named(tmp_path):
    source = dict(type=load_dataset, path="json", data_files=f"{tmp_path}/*.jsonl")
    with pytest.raises(UserError, match="no data file"):
        load_rows(source, "train")


def hub_of(name: str) -> dict:
    return dict(type=load_dataset, path="json", data_files=dict(train=name), split="train")


def test_folders_and_names_like_patterns_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"a": 1}\n')
    (folder / "self").symlink_to(".")
    (tmp_path / "a[1].jsonl").write_text('{"a": 2}\n')
    assert load_rows(hub_of("d"), "train")[:] == {"a": [1]}
    assert load_rows(hub_of("a[1].jsonl"), "train")[:] == {"a": [2]}


def test_folders_without_hidden_files_and_linked_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("d/a.jsonl", "d/._a.jsonl", "d/.ipynb_checkpoints/a.jsonl", "e/b.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text('{"a": 1}\n')
    Path("d/loop").symlink_to(".")
    Path("f").symlink_to("e")
    assert find_files(["d"]) == ["d/a.jsonl"] == find_files(["d/**/*.jsonl"])
    assert find_files(["f/**/*.jsonl"]) == ["f/b.jsonl"] == find_files(["f/*.jsonl"])
    assert len(load_rows(hub_of("d/**/*.jsonl"), "train")) == 1


def test_a_folder_with_a_file_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    Path("d/a.jsonl").write_text('{"a": 1}\n')
    Path("d/b.csv").write_text("a\n1\n")
    for value in ("d", "d/*"):
        with pytest.raises(UserError, match=r"d/b\.csv: .*cannot read a \.csv file"):
            load_rows(hub_of(value), "train")


def test_what_is_no_file_is_named_and_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "dangling.jsonl").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")  # reading it would never end
    for name in ("loop.jsonl", "dangling.jsonl"):
        with pytest.raises(UserError, match=rf"{name}:1: this data cannot be read"):
            load_rows(hub_of(name), "train")
        assert len(divide(name)) == 1
    for value in ("pipe.jsonl", "/dev/null", 5, None):
        with pytest.raises(UserError, match=r"no data file|no path|no data_files"):
            load_rows(hub_of(value), "train")


def test_compressed_files_are_known_by_their_bytes(tmp_path):
    text = b'{"a": 1}\n'
    for pack in (gzip, bz2, lzma):
        file = tmp_path / f"{pack.__name__}.jsonl"
        file.write_bytes(pack.compress(text))
        assert places(file) == [("row", 1)]
        file.write_bytes(pack.compress(text * 1000)[:-9])
        assert places(file)[-1][0] == "bad"
    for mark, name in {b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}.items():
        file = tmp_path / "packed.jsonl"
        file.write_bytes(mark + b"x" * 30)
        (row,) = read_rows(str(file))
        assert f"compressed ({name})" in row.why


def test_a_csv_file_is_read_with_the_delimiter_of_the_config(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("a;b\n1;2\n")
    (row,) = read_rows(str(file), delimiter=";")
    assert row.value == {"a": "1", "b": "2"}
    files = local_files(dict(type=load_dataset, path="csv", data_files=str(file), sep=";"))
    assert files.delimiter == ";"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("你好，世界", "GBK"),
        ("今天天气很好，我们去公园。", "GBK"),
        ("繁體中文測試資料", "Big5"),
        ("こんにちは世界", "CP932"),
        ("안녕하세요 반갑습니다 여러분", "CP949"),
    ],
)
def test_encodings_of_east_asia_are_told_apart(tmp_path, text, name):
    file = tmp_path / "a.jsonl"
    file.write_bytes(json.dumps({"a": text}, ensure_ascii=False).encode(name))
    (row,) = read_rows(str(file))
    expected = {"CP932": "Shift-JIS", "CP949": "EUC-KR"}.get(name, name)
    assert f"not UTF-8 but {expected};" in row.why
