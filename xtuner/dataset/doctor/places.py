"""From the number of a raw row back to its ``file:line``."""

from __future__ import annotations

from array import array

from xtuner.dataset.doctor.findings import Place
from xtuner.dataset.doctor.reading import Row
from xtuner.dataset.doctor.scan import Part


class Places:
    """Where each raw row is, by its number; read when it is first asked for; 12 bytes a row."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.files: list[str] = []
        self.numbers = array("i")
        self.lines = array("q")

    def __call__(self, number: int) -> Place:
        if not self.lines:
            self._read()
        if number >= len(self.lines):
            return Place(self.part.name, number + 1)
        return Place(self.files[self.numbers[number]], self.lines[number])

    def _read(self) -> None:
        known: dict[str, int] = {}
        for row in self.part.rows():
            if isinstance(row, Row):
                self.numbers.append(known.setdefault(row.file, len(known)))
                self.lines.append(row.line)
        self.files = list(known)
