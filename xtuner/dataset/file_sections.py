"""Files of JSON lines in sections that several processes read side by side."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from xtuner.dataset.json_stream import read_values
from xtuner.dataset.reading import Row, Unreadable, decoded, has_json_lines, read_rows, rows_of

SECTION = 1 << 24
"""Bytes of a section, about."""
LONGEST_LINE = 1 << 20
"""A file without the beginning of a row in so many bytes at the end of a section stays whole."""
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Section:
    """Whole lines of a file, or all of it.

    Attributes:
        file: its path.
        start, stop: the bytes from and to which it goes; ``stop`` is None for the whole file.
        line: the number of the first line.
        field, delimiter: as for ``read_rows``.
    """

    file: str
    start: int = 0
    stop: int | None = None
    line: int = 1
    field: str | None = None
    delimiter: str | None = None

    def __call__(self) -> Iterator[Row | Unreadable]:
        """The rows, with the lines of the file."""
        if self.stop is None:
            yield from read_rows(self.file, field=self.field, delimiter=self.delimiter)
            return
        with Path(self.file).open("rb") as raw:
            raw.seek(self.start)
            part = io.BufferedReader(_Bounded(raw, self.stop - self.start))
            stream = decoded(part, newline="\n", may_have_bom=self.start == 0)
            yield from rows_of(self.file, read_values(stream, lines=True), self.line - 1)


@dataclass(frozen=True)
class DataFiles:
    """The rows of several files, one file after the other.

    Attributes:
        files: their paths.
        field, delimiter: as for ``read_rows``.
    """

    files: Sequence[str]
    field: str | None = None
    delimiter: str | None = None

    def __call__(self) -> Iterator[Row | Unreadable]:
        """All rows."""
        for file in self.files:
            yield from read_rows(file, field=self.field, delimiter=self.delimiter)

    def sections(self) -> list[Section]:
        """The sections of all files, in order; together they have the rows that a call gives."""
        return [part for file in self.files for part in divide(file, self.field, self.delimiter)]


def divide(file: str, field: str | None = None, delimiter: str | None = None) -> list[Section]:
    """The sections of a file: one for a small file, and for one that is not JSON lines.

    Args:
        file: its path.
        field, delimiter: as for ``read_rows``.
    """
    whole = [Section(file, field=field, delimiter=delimiter)]
    size = Path(file).stat().st_size if Path(file).is_file() else 0
    if size < 2 * SECTION or field is not None or not has_json_lines(file):
        return whole
    sections: list[Section] = []
    start, line = 0, 1
    with Path(file).open("rb") as raw:
        while start < size:
            raw.seek(start + SECTION)
            if not _go_to_row(raw):
                return whole
            stop = min(raw.tell(), size)
            sections.append(Section(file, start, stop, line))
            line += _count_lines(raw, start, stop)
            start = stop
    return sections


def _go_to_row(raw: BinaryIO) -> bool:
    """Go to the next line with ``{`` first after one with ``}`` last, or to the end of the file.

    Between these no row goes on from line to line.

    Returns:
        False where none is near.
    """
    left, previous = LONGEST_LINE, b""
    while left > 0 and (line := raw.readline(left)):
        if previous.rstrip().endswith(b"}") and line.startswith(b"{"):
            raw.seek(-len(line), io.SEEK_CUR)
            return True
        left, previous = left - len(line), line
    return left > 0


def _count_lines(raw: BinaryIO, start: int, stop: int) -> int:
    raw.seek(start)
    sizes = (min(_BLOCK, stop - place) for place in range(start, stop, _BLOCK))
    return sum(raw.read(size).count(b"\n") for size in sizes)


class _Bounded(io.RawIOBase):
    """The next bytes of a file, up to a number of them."""

    def __init__(self, raw: BinaryIO, size: int) -> None:
        self.raw, self.left = raw, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        piece = self.raw.read(min(len(buffer), self.left))
        buffer[: len(piece)] = piece
        self.left -= len(piece)
        return len(piece)
