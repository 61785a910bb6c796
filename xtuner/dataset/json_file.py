"""Rows of one JSON or JSON-lines file, as a dataset."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from datasets import Dataset


def load_json_file(data_files: str | os.PathLike[str]) -> Dataset:
    """Return the rows of a local JSON or JSON-lines file.

    Args:
        data_files: the file.

    Raises:
        FileNotFoundError: when it does not exist.
    """
    from datasets import load_dataset

    return load_dataset("json", data_files=str(data_files), split="train")


def read_json_rows(file: str | os.PathLike[str]) -> list[Any]:
    """The rows of a ``.jsonl`` file, or of a ``.json`` file that is a list.

    Args:
        file: the file.

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
        return [_parsed(path, number, line) for number, line in lines if line.strip()]
    rows = _parsed(path, None, text)
    if not isinstance(rows, list):
        raise _unreadable(path, None, tr("it is not a list of rows", "不是数据列表"))
    return rows


def _parsed(path: Path, number: int | None, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _unreadable(path, number or error.lineno, error.msg) from error


def _unreadable(path: Path, line: int | None, why: Any) -> UserError:
    return UserError(
        tr(f"this data cannot be read: {why}", f"无法读取数据: {why}"), where=Where(str(path), line)
    )
