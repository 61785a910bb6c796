"""Rows of local data files with their places, in bounded memory and in spite of broken ones.

The one reader of data files: the doctor examines what it gives, image and preference datasets train
on it, and where ``datasets.load_dataset`` fails it names the line.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO, cast

from xtuner.dataset.json_stream import (
    LONGEST,
    Found,
    encoding_problem,
    has_lines,
    read_values,
    too_long,
)
from xtuner.utils.data_files import COMPRESSIONS, SUFFIXES, kind_of
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    import pyarrow as pa

_COMPRESSED: Mapping[bytes, Callable[..., BinaryIO]] = {
    b"\x1f\x8b": cast(Callable[..., BinaryIO], gzip.open),
    b"BZh": cast(Callable[..., BinaryIO], bz2.open),
    b"\xfd7zXZ\0": cast(Callable[..., BinaryIO], lzma.open),
}
_ARCHIVES = {b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a file raises, one that is compressed included."""
_WORKBOOK = b"\xd0\xcf\x11\xe0"
"""The first bytes of an ``.xls`` file."""
_SEPARATORS = ("\t", ",", ";")


@dataclass(frozen=True)
class Row:
    """One raw row: ``line`` counts from 1 (lines of text files, rows of tables)."""

    file: str
    line: int
    value: Any


@dataclass(frozen=True)
class Unreadable:
    """A row that cannot be read.

    Attributes:
        ends_file: whether the rows after it cannot be read, either.
    """

    file: str
    line: int
    why: str
    ends_file: bool = False


def find_files(paths: Iterable[str]) -> list[str]:
    """The data files meant by paths, folders and globs, sorted within each.

    Raises:
        UserError: when one of them names no file.
    """
    found: list[str] = []
    for each in paths:
        path = str(Path(each).expanduser()) if each.startswith("~") else each
        if Path(path).is_dir():
            there = sorted(Path(path).rglob("*"))
            files = [str(file) for file in there if _is_data(file) and not _is_hidden(file, path)]
        elif Path(path).is_file():
            files = [path]
        else:
            files = sorted(glob.glob(path, recursive=True))  # noqa: PTH207 (absolute globs)
            # No pipes or devices: reading them might never end.
            files = [file for file in files if Path(file).is_file() or Path(file).is_symlink()]
            files = [file for file in files if not _is_behind_link(file, path)]
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


def _is_hidden(file: Path, folder: str) -> bool:
    """Whether a file or a folder above it is hidden, as those of editors, notebooks and macOS."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _is_behind_link(file: str, pattern: str) -> bool:
    """Whether a file was found in a linked folder at ``**``, where ``datasets`` does not look."""
    before, stars, _ = pattern.partition("**")
    parts, fixed = Path(file).parts, len(Path(before).parts)
    ends = range(fixed + 1, len(parts)) if stars else ()
    return any(Path(*parts[:end]).is_symlink() for end in ends)


def _is_data(file: Path) -> bool:
    return file.is_file() and kind_of(file.name) in SUFFIXES


def read_rows(
    file: str,
    *,
    field: str | None = None,
    lines: bool | None = None,
    delimiter: str | None = None,
) -> Iterator[Row | Unreadable]:
    """Read one file of any kind in ``SUFFIXES``, plain or compressed; other names count as JSON.

    JSON is one value a line, an array, or values one after the other, whatever the suffix says.
    Lines end at ``\\n``: characters such as U+2028 are part of the text that they stand in.

    Args:
        file: its path.
        field: of a JSON file that is one object: the key that holds the rows.
        lines: whether a JSON file has one value a line; None finds out.
        delimiter: of the columns of a csv file; None for what its header has.
    """
    kind = kind_of(file)
    if kind in (".parquet", ".arrow"):
        yield from _read_table(file, kind)
        return
    line = 1
    try:
        with open_file(file) as raw:
            if encoding := _wide_encoding(raw):
                why = tr("the file is {encoding}; save it as UTF-8", encoding=encoding)
                yield Unreadable(file, 1, why, ends_file=True)
            elif kind in (".csv", ".tsv"):
                yield from _read_csv(file, raw, delimiter or _separator(raw))
            elif kind == ".txt":
                yield from _read_text(file, raw)
            else:
                stream = decoded(raw, newline="\n")
                values = read_values(stream, field=field, lines=lines, is_jsonl=kind == ".jsonl")
                for row in rows_of(file, values):
                    line = row.line
                    yield row
    except READ_ERRORS as error:
        yield Unreadable(file, line, str(error), ends_file=True)


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


def problem_of(row: Row | Unreadable) -> str:
    """Why a row cannot be trained on, whatever its fields; empty where it can."""
    if isinstance(row, Unreadable):
        return row.why
    return "" if isinstance(row.value, dict) else tr("the row is not an object")


def has_json_lines(file: str) -> bool:
    """Whether a file is plain JSON (not compressed) with one value a line."""
    if kind_of(file) in SUFFIXES[2:]:
        return False
    with open_file(file) as raw:
        if isinstance(raw.raw, gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile) or _wide_encoding(raw):
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


def open_file(file: str) -> io.BufferedReader:
    """The bytes of a file; one that is compressed is decompressed, whatever its name.

    Raises:
        OSError: when it cannot be opened, or is compressed in another way.
    """
    with Path(file).open("rb") as raw:
        start = raw.read(6)
    for mark, open_compressed in _COMPRESSED.items():
        if start.startswith(mark):
            return io.BufferedReader(cast(io.RawIOBase, open_compressed(file, "rb")))
    if start.startswith(_WORKBOOK) or Path(file).suffix.lower() == ".xlsx":
        raise OSError(tr("this is an Excel workbook; save the table as CSV UTF-8"))
    for mark, name in _ARCHIVES.items():
        if start.startswith(mark):
            raise OSError(tr("the file is compressed ({name}); unpack it", name=name))
    if start and Path(file).suffix.lower() in COMPRESSIONS:
        raise OSError(tr("its name says that it is compressed, but it is not; rename it"))
    return Path(file).open("rb")


def separator_of(file: str) -> str:
    """What separates the columns of a table in text form: a tab, a comma or a semicolon.

    Excel writes semicolons where the locale has decimal commas.
    """
    with open_file(file) as raw:
        return _separator(raw)


def _separator(raw: io.BufferedReader) -> str:
    header = raw.peek(1).partition(b"\n")[0]
    return next((sign for sign in _SEPARATORS if sign.encode() in header), ",")


def decoded(raw: BinaryIO, newline: str | None, may_have_bom: bool = True) -> TextIO:
    """Text in UTF-8; bytes that are not become lone surrogates, which are looked for in rows."""
    encoding = "utf-8-sig" if may_have_bom else "utf-8"
    return io.TextIOWrapper(raw, encoding, errors="surrogateescape", newline=newline)


def _wide_encoding(raw: io.BufferedReader) -> str:
    """The encoding of a text whose characters have 2 or 4 bytes each; empty for any other."""
    start = raw.peek(4)[:4]
    if start in (b"\xff\xfe\0\0", b"\0\0\xfe\xff") or start.count(0) == 3:
        return "UTF-32"
    has_bom = start[:2] in (b"\xff\xfe", b"\xfe\xff")
    return "UTF-16" if has_bom or start[::2] == b"\0\0" or start[1::2] == b"\0\0" else ""


def _read_text(file: str, raw: BinaryIO) -> Iterator[Row | Unreadable]:
    stream = decoded(raw, newline=None)
    for number, line in enumerate(iter(partial(stream.readline, LONGEST), ""), 1):
        if len(line) == LONGEST:
            yield Unreadable(file, number, too_long(), ends_file=True)
            return
        why = encoding_problem(line)
        yield (
            Unreadable(file, number, why) if why else Row(file, number, {"text": line.rstrip("\n")})
        )


def _read_csv(file: str, raw: BinaryIO, delimiter: str) -> Iterator[Row | Unreadable]:
    csv.field_size_limit(LONGEST)
    reader = csv.reader(decoded(raw, newline=""), delimiter=delimiter)
    header: list[str] | None = None
    before = 0
    try:
        for cells in reader:
            line, before = before + 1, reader.line_num
            why = encoding_problem("".join(cells))
            if why:
                yield Unreadable(file, line, why, ends_file=header is None)
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
        yield Unreadable(file, reader.line_num, str(error), ends_file=True)


def _read_table(file: str, kind: str) -> Iterator[Row | Unreadable]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        batches = pq.ParquetFile(file).iter_batches(1024) if kind == ".parquet" else _arrow(file)
        for batch in batches:
            for value in _with_json(batch.to_pylist(), batch.schema):
                number += 1
                yield Row(file, number, value)
    except (pa.ArrowInvalid, OSError) as error:
        why = str(error).split("\n", 1)[0]
        yield Unreadable(file, number + 1, why, ends_file=True)


def _with_json(values: list[dict[str, Any]], schema: pa.Schema) -> list[dict[str, Any]]:
    """Rows with the columns decoded that ``datasets`` has written as JSON text."""
    if b'"Json"' not in (schema.metadata or {}).get(b"huggingface", b""):
        return values
    from datasets import Features

    features = Features.from_arrow_schema(schema)
    columns = Features({name: kind for name, kind in features.items() if "Json(" in str(kind)})
    return [row | columns.decode_example({name: row[name] for name in columns}) for row in values]


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
