"""The embedded training rows: OpenAI ``messages`` with the assistant's name filled in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_FILE = Path(__file__).parent / "rows.jsonl"
NAME_MARK = "{bot_name}"


def read_rows() -> list[dict[str, Any]]:
    """Return the rows as they are in the file, the name still a mark."""
    with ROWS_FILE.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def load_rows(bot_name: str) -> Dataset:
    """Return the rows as a ``datasets.Dataset`` with one column, ``messages``.

    Args:
        bot_name: the name that the assistant gives itself in every answer.
    """
    from datasets import Dataset

    rows = read_rows()
    for row in rows:
        for message in row["messages"]:
            message["content"] = message["content"].replace(NAME_MARK, bot_name)
    return Dataset.from_list(rows)
