"""Rows of one JSON or JSON-lines file, as a dataset."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

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
