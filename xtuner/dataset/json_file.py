"""Rows of one JSON or JSON-lines file, as a dataset."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xtuner.dataset.reading import Row, Unreadable, read_rows, require_file, require_rows
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class BrokenRow:
    """Takes the place of a row that cannot be used.

    Attributes:
        why: what is wrong with it.
    """

    why: str


def load_json_file(data_files: str | os.PathLike[str]) -> Dataset:
    """Return the rows of a local JSON or JSON-lines file.

    Args:
        data_files: the file.

    Raises:
        FileNotFoundError: when it does not exist.
    """
    from datasets import load_dataset

    return load_dataset("json", data_files=str(data_files), split="train")


def read_json_rows(file: str | os.PathLike[str], keep_broken: bool = False) -> list[Any]:
    """The rows of a JSON file: one a line, or an array.

    Args:
        file: the file.
        keep_broken: a row that is not JSON becomes a ``BrokenRow`` instead of an error.

    Raises:
        UserError: naming the file when it cannot be read, and the line that is not JSON.
    """
    path = os.fspath(file)
    if not keep_broken:
        return [row.value for row in require_rows(path)]
    require_file(path)
    return [_row_or_broken(row) for row in read_rows(path)]


def _row_or_broken(row: Row | Unreadable) -> Any:
    if isinstance(row, Row):
        return row.value
    return BrokenRow(tr("line {number}: {message}", number=row.line, message=row.why))
