"""Rows of one JSON or JSON-lines file, as a dataset."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class BrokenRow:
    """Stands where a row should be that cannot be used.

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
    """The rows of a ``.jsonl`` file, or of a ``.json`` file that is a list.

    Args:
        file: the file.
        keep_broken: a line that is not JSON becomes a ``BrokenRow`` instead of an error.

    Raises:
        UserError: naming the file, and the line that is not JSON.
    """
    path = Path(file)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, None, getattr(error, "strerror", None) or error) from error
    if path.suffix == ".jsonl":
        lines = enumerate(text.splitlines(), 1)
        return [_line(path, number, line, keep_broken) for number, line in lines if line.strip()]
    rows = _parsed(path, None, text)
    if not isinstance(rows, list):
        raise _unreadable(path, None, tr("it is not a list of rows"))
    return rows


def _line(path: Path, number: int, text: str, keep_broken: bool) -> Any:
    try:
        return _parsed(path, number, text)
    except UserError as error:
        if not keep_broken:
            raise
        return BrokenRow(tr("line {number}: {message}", number=number, message=error.message))


def _parsed(path: Path, number: int | None, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _unreadable(path, number or error.lineno, error.msg) from error


def _unreadable(path: Path, line: int | None, why: Any) -> UserError:
    return UserError(tr("this data cannot be read: {why}", why=why), where=Where(str(path), line))
