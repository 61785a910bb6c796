"""From the number of a raw row back to its ``file:line``."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

from xtuner.dataset.reading import Row, Unreadable, problem_of
from xtuner.doctor.findings import Place
from xtuner.doctor.parts import find_parts
from xtuner.doctor.scan import Part
from xtuner.utils.errors import UserError


class Places:
    """Where each raw row is, by its number; read as far as is asked for; 12 bytes a row."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.files: dict[str, int] = {}
        self.numbers = array("i")
        self.lines = array("q")
        self._rows: Iterator[Row | Unreadable] | None = None

    def __call__(self, number: int) -> Place:
        if self._rows is None:
            self._rows = self.part.rows()
        while number >= len(self.lines):
            row = next(self._rows, None)
            if row is None:
                return Place(self.part.name, number + 1)
            is_row = not problem_of(row) if self.part.drops_bad_rows else isinstance(row, Row)
            if is_row:
                self.numbers.append(self.files.setdefault(row.file, len(self.files)))
                self.lines.append(row.line)
        return Place(list(self.files)[self.numbers[number]], self.lines[number])


class Tracer:
    """From the row numbers of a batch to ``file:line``, where the files are known.

    Args:
        dataset: the value of ``train_dataloader.dataset`` in a config.
    """

    def __init__(self, dataset: object) -> None:
        self._places: list[Places] = []
        if isinstance(dataset, Mapping):
            with contextlib.suppress(UserError, KeyError):
                self._places = [Places(part) for part in find_parts(dataset)]

    def __call__(self, data: Mapping[str, Any]) -> list[str]:
        """The places of the rows of a collated batch, in order."""
        rows = list(data.get("rows") or [])
        parts = data.get("parts") or [0] * len(rows)
        return [self._place(part, row) for part, row in zip(parts, rows, strict=True)]

    def _place(self, part: int, row: object) -> Any:
        if isinstance(row, int) and part < len(self._places):
            return str(self._places[part](row))
        return row
