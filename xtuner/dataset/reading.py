"""Rows of local data files with their places, in bounded memory and in spite of broken ones.

The one reader of data files: the doctor examines what it gives, image and preference datasets train
on it, and where ``datasets.load_dataset`` fails it names the line.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO, cast

from xtuner.dataset.json_stream import Found, encoding_problem, has_lines, read_values
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
LONGEST_CELL = 64 << 20
"""Characters of a cell of a table in text form, at most."""
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


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
    return file.is_file() and kind_of(file.name) in SUFFIXES


def kind_of(name: str) -> str:
    """The suffix of a data file's name, without ``.gz`` and in lower case."""
    return Path(name.removesuffix(".gz")).suffix.lower()


def read_rows(
    file: str, *, field: str | None = None, lines: bool | None = None
) -> Iterator[Row | Unreadable]:
    """Read one file of any kind in ``SUFFIXES``, plain or ``.gz``; other names count as JSON.

    JSON is one value a line, an array, or values one after the other, whatever the suffix says.
    Lines end at ``\\n``: characters such as U+2028 are part of the text that they stand in.

    Args:
        file: its path.
        field: of a JSON file that is one object: the key that holds the rows.
        lines: whether a JSON file has one value a line; None finds out.
    """
    kind = kind_of(file)
    if kind in (".parquet", ".arrow"):
        yield from _read_table(file, kind)
        return
    line = 1
    try:
        with _open(file) as raw:
            if raw.peek(2)[:2] in _UTF16_MARKS:
                yield Unreadable(file, 1, tr("the file is UTF-16; save it as UTF-8"))
            elif kind in (".csv", ".tsv"):
                yield from _read_csv(file, raw, "\t" if kind == ".tsv" else ",")
            elif kind == ".txt":
                yield from _read_text(file, raw)
            else:
                stream = decoded(raw, newline="\n")
                values = read_values(stream, field=field, lines=lines, is_jsonl=kind == ".jsonl")
                for row in rows_of(file, values):
                    line = row.line
                    yield row
    except (OSError, EOFError, zlib.error) as error:
        yield Unreadable(file, line, str(error))


def rows_of(file: str, values: Iterable[Found], before: int = 0) -> Iterator[Row | Unreadable]:
    """The values of a file as its rows.

    Args:
        file: its path.
        values: from ``read_values``.
        before: the lines of the file before the text that they are from.
    """
    for line, value, why in values:
        number = before + line
        yield Unreadable(file, number, why) if why else Row(file, number, value)


def has_json_lines(file: str) -> bool:
    """Whether a file is plain JSON (not compressed) with one value a line."""
    if file.endswith(".gz") or kind_of(file) in SUFFIXES[2:]:
        return False
    with _open(file) as raw:
        if raw.peek(2)[:2] in _UTF16_MARKS:
            return False
        return has_lines(decoded(raw, newline="\n"), is_jsonl=kind_of(file) == ".jsonl")


def require_rows(file: str, *, lines: bool | None = None) -> Iterator[Row]:
    """The rows of a file all of whose rows are needed.

    Args:
        file: its path.
        lines: as for ``read_rows``.

    Raises:
        UserError: when the file cannot be opened, or at the first row that cannot be read.
    """
    require_file(file)
    for row in read_rows(file, lines=lines):
        if isinstance(row, Unreadable):
            raise unreadable(row.why, file, row.line)
        yield row


def require_file(file: str) -> None:
    """Open a file to see that it can be.

    Raises:
        UserError: with the reason of the operating system.
    """
    try:
        Path(file).open("rb").close()
    except OSError as error:
        raise unreadable(error.strerror or str(error), file) from error


def unreadable(why: str, file: str, line: int | None = None) -> UserError:
    """The error that names a file, or a row of it, that cannot be read."""
    return UserError(tr("this data cannot be read: {why}", why=why), where=Where(file, line))


def _open(file: str) -> io.BufferedReader:
    if file.endswith(".gz"):
        return io.BufferedReader(cast(io.RawIOBase, gzip.open(file, "rb")))
    return Path(file).open("rb")


def decoded(raw: BinaryIO, newline: str | None, may_have_bom: bool = True) -> TextIO:
    """Text in UTF-8; bytes that are not become lone surrogates, which are looked for in rows."""
    encoding = "utf-8-sig" if may_have_bom else "utf-8"
    return io.TextIOWrapper(raw, encoding, errors="surrogateescape", newline=newline)


def _read_text(file: str, raw: BinaryIO) -> Iterator[Row | Unreadable]:
    for number, line in enumerate(decoded(raw, newline=None), 1):
        why = encoding_problem(line)
        yield (
            Unreadable(file, number, why) if why else Row(file, number, {"text": line.rstrip("\n")})
        )


def _read_csv(file: str, raw: BinaryIO, delimiter: str) -> Iterator[Row | Unreadable]:
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(decoded(raw, newline=""), delimiter=delimiter)
    header: list[str] | None = None
    before = 0
    try:
        for cells in reader:
            line, before = before + 1, reader.line_num
            why = encoding_problem("".join(cells))
            if why:
                yield Unreadable(file, line, why)
                if header is None:
                    return
            elif header is None:
                header = cells
            elif len(cells) == len(header):
                yield Row(file, line, dict(zip(header, cells, strict=True)))
            elif cells:
                problem = tr(
                    "{count} columns where the header has {expected}",
                    count=len(cells),
                    expected=len(header),
                )
                yield Unreadable(file, line, problem)
    except csv.Error as error:
        yield Unreadable(file, reader.line_num, str(error))


def _read_table(file: str, kind: str) -> Iterator[Row | Unreadable]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        batches = pq.ParquetFile(file).iter_batches(1024) if kind == ".parquet" else _arrow(file)
        for batch in batches:
            for value in batch.to_pylist():
                number += 1
                yield Row(file, number, value)
    except (pa.ArrowInvalid, OSError) as error:
        yield Unreadable(file, number + 1, str(error).split("\n", 1)[0])


def _arrow(file: str) -> Iterator[pa.RecordBatch]:
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
