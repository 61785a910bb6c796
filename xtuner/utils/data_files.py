"""Names of data files: which suffixes there are, and which loader of ``datasets`` reads each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

SUFFIXES_OF: Mapping[str, tuple[str, ...]] = {
    "json": (".json", ".jsonl"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "text": (".txt",),
}
"""``load_dataset(path=...)`` values that read files, and the suffixes of these."""
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zip")
_OTHER_NAMES = {"jsonl": "json", "jsonlines": "json", "ndjson": "json", "tsv": "csv", "txt": "text"}


def kind_of(name: str) -> str:
    """The suffix of a data file's name, without that of its compression and in lower case."""
    path = Path(name.lower())
    return (path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix


def loader_of(file: str) -> str | None:
    """The ``path`` of ``load_dataset`` for a file, by its suffix; None for an unknown one."""
    kind = kind_of(file)
    return next((name for name, kinds in SUFFIXES_OF.items() if kind in kinds), None)


def loader_meant(path: str) -> str | None:
    """The ``path`` of ``load_dataset`` that is meant by a suffix in its place; None for others."""
    return _OTHER_NAMES.get(path.lower().removeprefix("."))


_PART = re.compile(r"\w+(\.\w+)*(\[(-?\d+%?)?:(-?\d+%?)?\](\((closest|pct1_dropremainder)\))?)?")


def is_split(split: str) -> bool:
    """Whether ``load_dataset`` can read this as a split."""
    return all(_PART.fullmatch(part.strip()) for part in split.split("+"))


def split_names(split: str, named: Mapping[str, object]) -> list[str]:
    """The splits that one is made of.

    Args:
        split: as ``load_dataset`` takes it: ``train``, ``train[:100]``, ``train+validation``.
        named: all that there are, by name.
    """
    if split == "all":
        return list(named)
    return list(dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+")))
