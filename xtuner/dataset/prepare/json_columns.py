"""Local JSON files whose columns hold values of several types, loaded as they are written.

``datasets`` infers one schema from the first block of the first file. Where a later block needs
another one, loading fails; or, when text meets text and lists, the later block comes back as JSON
text: ``hi`` as ``"hi"``. Both are noticed here, and the columns are loaded as ``datasets.Json``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from xtuner.dataset.reading import (
    READ_ERRORS,
    Row,
    Unreadable,
    find_files,
    kind_of,
    open_file,
    read_rows,
)
from xtuner.dataset.sources import LocalFiles, paths_in

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

BLOCK = 1 << 22
"""Bytes that are read at a time."""
CONTEXT = 64
"""Bytes before a value that are looked at."""
ROWS_COMPARED = 3
"""Suspicious rows of a column that are compared with the file."""


def are_json(files: LocalFiles) -> bool:
    """Whether the files are JSON, by their names."""
    return all(kind_of(file) in (".json", ".jsonl") for file in find_files(files.paths))


def has_null_rows(file: str) -> bool:
    """Whether a JSON file may have a row that is null, or cannot be read at all."""
    before = b"\n"
    try:
        with open_file(file) as raw:
            while block := raw.read(BLOCK):
                text = before + block
                if any(_may_be_row(text, match.start()) for match in re.finditer(b"null", text)):
                    return True
                before = text[-CONTEXT:]
    except READ_ERRORS:
        return True
    return False


def _may_be_row(text: bytes, start: int) -> bool:
    """Whether a ``null`` may be a row, by what stands before it: no key, and no other value."""
    left = text[max(0, start - CONTEXT) : start].rstrip(b" \t\r")
    return left.endswith((b"\n", b"[", b"},", b"null,"))


def json_features(files: LocalFiles) -> Any:
    """``datasets.Features`` with every column of the files as ``Json``."""
    from datasets import Features, Json

    names: dict[str, None] = {}
    for row in _objects(files):
        names.update(dict.fromkeys(row))
    return Features(dict.fromkeys(names, Json()))


def is_as_written(loaded: Any, source: Mapping[str, Any], files: LocalFiles) -> bool:
    """Whether a loaded dataset has the texts of its files.

    Args:
        loaded: a ``Dataset`` or ``DatasetDict``.
        source: the settings that it was loaded by.
        files: the files behind it.
    """
    splits = loaded if isinstance(loaded, Mapping) else {"": loaded}
    named = source.get("data_files")
    for name, dataset in splits.items():
        paths = paths_in(named[name]) if isinstance(named, Mapping) and name in named else None
        if not _is_as_written(dataset, files, paths):
            return False
    return True


def _is_as_written(dataset: Dataset, files: LocalFiles, paths: Sequence[str] | None) -> bool:
    if not hasattr(dataset, "data") or dataset._indices is not None:
        return True
    suspicious: dict[int, list[str]] = {}
    for column in dataset.data.columns:
        for number, text in islice(_quoted(column), ROWS_COMPARED):
            suspicious.setdefault(number, []).append(text)
    if not suspicious:
        return True
    rows = islice(_objects(files, paths), max(suspicious) + 1)
    for number, row in enumerate(rows):
        if number in suspicious and not set(suspicious[number]) <= set(_texts(row)):
            return False
    return True


def rows_of_files(
    files: LocalFiles, paths: Sequence[str] | None = None
) -> Iterator[Row | Unreadable]:
    """The rows of files, and what cannot be read.

    Args:
        files: how they are read.
        paths: of those that are; None for all.
    """
    for file in find_files(files.paths if paths is None else paths):
        yield from read_rows(file, field=files.field, delimiter=files.delimiter)


def _objects(files: LocalFiles, paths: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    for row in rows_of_files(files, paths):
        if isinstance(row, Row) and isinstance(row.value, dict):
            yield row.value


def _texts(value: object) -> Iterator[str]:
    """All texts in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _quoted(column: pa.ChunkedArray) -> Iterator[tuple[int, str]]:
    """The texts of a column that look like JSON, each with the number of its row, by row."""
    import numpy as np
    import pyarrow.compute as pc

    start = 0
    for chunk in column.chunks:
        found = []
        for texts, rows in _leaves(chunk, np.arange(start, start + len(chunk))):
            both = pc.and_(pc.starts_with(texts, '"'), pc.ends_with(texts, '"'))
            nested = pc.or_(pc.starts_with(texts, "[{"), pc.starts_with(texts, '{"'))
            places = pc.indices_nonzero(pc.fill_null(pc.or_(both, nested), False)).to_numpy()
            found += [(int(rows[i]), texts[int(i)].as_py()) for i in places[:ROWS_COMPARED]]
        yield from sorted(found)
        start += len(chunk)


def _leaves(array: pa.Array, rows: Any) -> Iterator[tuple[pa.Array, Any]]:
    """The texts inside an array with, for each, the number of its row."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        yield array, rows
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _leaves(array.flatten(), rows[pc.list_parent_indices(array).to_numpy()])
    elif pa.types.is_struct(kind):
        for index in range(kind.num_fields):
            yield from _leaves(pc.struct_field(array, [index]), rows)
