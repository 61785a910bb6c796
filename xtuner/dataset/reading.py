"""Raw rows of local files, each with its place, in bounded memory and in spite of broken ones."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
CHUNK = 1 << 18
"""Characters read at a time from a JSON array."""
LONGEST_ROW = 64 << 20
"""Characters after which a row of a JSON array that does not end counts as broken."""
REPLACED = "\ufffd"


@dataclass(frozen=True)
class Row:
    """One raw row: ``line`` counts from 1 (lines of text files, rows of tables)."""

    file: str
    line: int
    value: Any


@dataclass(frozen=True)
class Unreadable:
    """A row, or the rest of a file, that cannot be read."""

    file: str
    line: int
    why: str


def find_files(paths: Iterable[str]) -> list[str]:
    """The data files meant by paths, folders and globs, sorted within each.

    Raises:
        UserError: when one of them names no file.
    """
    found: list[str] = []
    for path in paths:
        if Path(path).is_dir():
            files = [str(file) for file in sorted(Path(path).rglob("*")) if _is_data(file)]
        elif Path(path).is_file():
            files = [path]
        else:
            files = sorted(glob.glob(path, recursive=True))  # noqa: PTH207 (absolute globs)
        if not files:
            raise UserError(
                tr("there is no data file {path!r}", path=path),
                hint=tr(
                    "correct the path in the config; a path is seen from the folder where the "
                    "command runs: {folder}",
                    folder=Path.cwd(),
                ),
            )
        found += files
    return found


def _is_data(file: Path) -> bool:
    return file.is_file() and _kind(file.name) in SUFFIXES


def _kind(name: str) -> str:
    return Path(name.removesuffix(".gz")).suffix.lower()


def read_rows(file: str) -> Iterator[Row | Unreadable]:
    """Read one file of any kind in ``SUFFIXES``, plain or ``.gz``; other names count as JSON."""
    kind = _kind(file)
    if kind in (".parquet", ".arrow"):
        yield from _read_table(file, kind)
        return
    try:
        with _open(file) as stream:
            if kind in (".csv", ".tsv"):
                yield from _read_csv(file, stream, "\t" if kind == ".tsv" else ",")
            elif kind == ".txt":
                lines = enumerate(stream, 1)
                yield from (Row(file, n, {"text": line.rstrip("\n")}) for n, line in lines)
            elif _is_lines(stream, kind):
                yield from _read_lines(file, stream)
            else:
                yield from _read_array(file, stream)
    except (OSError, EOFError) as error:
        yield Unreadable(file, 1, str(error))


def _open(file: str) -> TextIO:
    """Text in UTF-8; bytes that are not UTF-8 become U+FFFD, which a check finds."""
    opener: Any = gzip.open if file.endswith(".gz") else open
    raw = opener(file, "rb")
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace", newline="")


def _is_lines(stream: TextIO, kind: str) -> bool:
    """Whether a JSON file has one object a line, by its first complete line."""
    if kind == ".jsonl":
        return True
    first = ""
    while not first.strip():
        first = stream.readline(CHUNK)
        if not first:
            break
    stream.seek(0)
    first = first.strip()
    return first.startswith("{") and first.endswith("}")


def _read_lines(file: str, stream: TextIO) -> Iterator[Row | Unreadable]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            yield Row(file, number, json.loads(line.rstrip()))
        except (ValueError, RecursionError) as error:
            yield Unreadable(file, number, _reason(error))


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return tr("{message} (column {column})", message=error.msg, column=error.colno)
    return str(error)


def _read_csv(file: str, stream: TextIO, delimiter: str) -> Iterator[Row | Unreadable]:
    csv.field_size_limit(LONGEST_ROW)
    reader = csv.reader(stream, delimiter=delimiter)
    header: list[str] | None = None
    before = 0
    try:
        for cells in reader:
            line, before = before + 1, reader.line_num
            if header is None:
                header = cells
            elif len(cells) == len(header):
                yield Row(file, line, dict(zip(header, cells, strict=True)))
            elif cells:
                yield Unreadable(
                    file,
                    line,
                    tr(
                        "{cells} columns where the header has {columns}",
                        cells=len(cells),
                        columns=len(header),
                    ),
                )
    except csv.Error as error:
        yield Unreadable(file, reader.line_num, str(error))


def _read_table(file: str, kind: str) -> Iterator[Row | Unreadable]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in (
            pq.ParquetFile(file).iter_batches(1024) if kind == ".parquet" else _arrow(file)
        ):
            for value in batch.to_pylist():
                number += 1
                yield Row(file, number, value)
    except (pa.ArrowInvalid, OSError) as error:
        yield Unreadable(file, number + 1, str(error).splitlines()[0])


def _arrow(file: str) -> Iterator[Any]:
    """The batches of an Arrow stream (as ``datasets`` writes it) or an Arrow file."""
    import pyarrow as pa

    with pa.memory_map(file) as source:
        try:
            yield from pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_file(source)
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)


class _Window:
    """The part of a stream that is being decoded, and the line number of its start."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.text = ""
        self.line = 1
        self.ended = False
        self.indent = 0
        """How far the row that is being read is indented."""

    def more(self) -> bool:
        """Read on; at least doubles the window so that long rows are not decoded too often."""
        piece = self.stream.read(max(CHUNK, len(self.text)))
        self.ended = not piece
        self.text += piece
        return bool(piece)

    def drop(self, count: int) -> None:
        """Forget the first characters."""
        self.line += self.text.count("\n", 0, count)
        self.text = self.text[count:]

    def skip(self, pattern: re.Pattern[str]) -> str:
        """Skip what matches at the start (never more than there is); gives what was skipped."""
        skipped = ""
        while True:
            match = pattern.match(self.text)
            assert match is not None  # the patterns match the empty text
            skipped += match.group()
            self.drop(match.end())
            if self.text or not self.more():
                return skipped


_SPACE = re.compile(r"\s*")
_BETWEEN = re.compile(r"[\s,]*")
_FAR = 64
"""A mistake this far before the end of the window is not for want of more text."""


def _read_array(file: str, stream: TextIO) -> Iterator[Row | Unreadable]:
    """Elements of ``[...]``, or objects one after the other."""
    window = _Window(stream)
    window.skip(_SPACE)
    inside = window.text.startswith("[")
    if inside:
        window.drop(1)
    first = True
    while True:
        line = window.line
        between = window.skip(_BETWEEN)
        if not window.text or (inside and window.text.startswith("]")):
            break
        if inside and not first and "," not in between:
            yield Unreadable(file, line, tr("a comma is missing before this row"))
        first = False
        window.indent = len(between) - between.rfind("\n") - 1 if "\n" in between else 0
        yield from _next_element(file, window)
    if inside and not window.text:
        yield Unreadable(file, window.line, tr("the list is not closed by ]"))


def _next_element(file: str, window: _Window) -> Iterator[Row | Unreadable]:
    line = window.line
    decoder = json.JSONDecoder()
    while True:
        try:
            value, end = decoder.raw_decode(window.text)
        except json.JSONDecodeError as error:
            unfinished = error.msg.startswith("Unterminated") or (
                error.pos > len(window.text) - _FAR
            )
            if unfinished and len(window.text) < LONGEST_ROW and not window.ended:
                window.more()
                continue
            wrong = line + window.text.count("\n", 0, error.pos)
            yield Unreadable(file, wrong, _reason(error))
            _resume(window)
            return
        if end == len(window.text) and window.more():
            continue  # a number may go on
        yield Row(file, line, value)
        window.drop(end)
        return


def _resume(window: _Window) -> None:
    """After a broken row, go to the next line that starts one: ``{`` no deeper than this one."""
    next_row = re.compile(rf"\n[ \t]{{0,{window.indent}}}(?=\{{)")
    while True:
        match = next_row.search(window.text, 1)
        if match:
            window.drop(match.end())
            window.text = "," + window.text
            return
        if window.ended:
            window.drop(len(window.text))
            window.text = "]"
            return
        window.more()
