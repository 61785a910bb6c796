"""Local JSON files whose columns hold values of several types, loaded as they are written.

``datasets`` infers one schema from the first block of the first file. Where a later block needs
another one, loading fails; or, when text meets text and lists, the later block comes back as JSON
text: ``hi`` as ``"hi"``. Where one block has both, they are kept as JSON, and the text ``true``
comes back as a switch, ``1.50`` as 1.5. All of this is noticed here, and the rows are read by
``reading``, into columns of ``datasets.Json`` that hold texts in quotes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.dataset.json_stream import LONGEST
from xtuner.dataset.reading import (
    READ_ERRORS,
    Row,
    Unreadable,
    find_files,
    kind_of,
    open_file,
    problem_of,
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
_ODD_NUMBER = re.compile(r"\d{19}|NaN|Infinity")


def are_json(files: LocalFiles) -> bool:
    """Whether the files are JSON, by their names."""
    return all(kind_of(file) in (".json", ".jsonl") for file in find_files(files.paths))


def needs_reading(file: str) -> bool:
    """Whether a JSON or text file may have a row that ``datasets`` must not be given.

    Arrow's reader ends the process at a row that is null, and takes several times the memory of a
    row, however long: lines of more than ``LONGEST`` bytes are read first, with a limit. So is what
    cannot be read at all.
    """
    before, length = b"\n", 0
    try:
        with open_file(file) as raw:
            while block := raw.read(BLOCK):
                text = before + block
                if any(_may_be_row(text, match.start()) for match in re.finditer(b"null", text)):
                    return True
                before = text[-CONTEXT:]
                length = length + len(block) if b"\n" not in block else len(block)
                if length > LONGEST:
                    return True
    except READ_ERRORS:
        return True
    return False


def _may_be_row(text: bytes, start: int) -> bool:
    """Whether a ``null`` may be a row, by what stands before it: no key, and no other value."""
    left = text[max(0, start - CONTEXT) : start].rstrip(b" \t\r")
    return left.endswith((b"\n", b"[", b"},", b"null,"))


def json_features(files: LocalFiles) -> Any:
    """``datasets.Features`` of the files' columns: those of nothing but texts, and ``Json``."""
    from datasets import Features, Json, Value

    has_others: dict[str, bool] = {}
    for row in _objects(files):
        for name, value in row.items():
            is_other = value is not None and not isinstance(value, str)
            has_others[name] = has_others.get(name, False) or is_other
    return Features(
        {name: Json() if other else Value("string") for name, other in has_others.items()}
    )


def has_json_columns(loaded: Any) -> bool:
    """Whether ``datasets`` keeps values as JSON text, where the text ``true`` is a switch again.

    Args:
        loaded: a ``Dataset`` or ``DatasetDict``.
    """
    parts = loaded.values() if isinstance(loaded, Mapping) else [loaded]
    return any("Json(" in str(getattr(part, "features", "")) for part in parts)


def rows_as_written(files: LocalFiles) -> Dataset:
    """The rows of files, read here, each value as it is written.

    Rows that cannot be read are left out.
    """
    from datasets import Dataset, Json

    features = json_features(files)
    columns = [name for name, kind in features.items() if isinstance(kind, Json)]
    names = [Path(file).resolve() for file in find_files(files.paths)]
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in names]
    # The states are part of the name by which datasets keeps what it has read.
    return Dataset.from_generator(
        _values_as_written,
        features=features,
        gen_kwargs={
            "states": tuple(states),
            "files": replace(files, paths=[]),
            "columns": tuple(columns),
        },
    )


def _values_as_written(
    states: Sequence[tuple[str, int, int]], files: LocalFiles, columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for row in _objects(files, [file for file, _, _ in states]):
        yield {**row, **{name: _as_json(row.get(name)) for name in columns}}


def _as_json(value: Any) -> str | None:
    """A value as the JSON text that ``datasets.Json`` reads; a text in quotes, so it stays one.

    Numbers that have no form there (beyond 64 bits, infinite, not a number) lose precision or are
    nothing.
    """
    if value is None:
        return None
    text = json.dumps(value, ensure_ascii=False)
    if _ODD_NUMBER.search(text):
        value = json.loads(text, parse_int=_in_64_bits, parse_constant=lambda _: None)
        text = json.dumps(value, ensure_ascii=False)
    return text


def _in_64_bits(digits: str) -> int | float | None:
    if len(digits) < 19:
        return int(digits)
    number = float(digits)
    return number if math.isfinite(number) else None


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
        if isinstance(row, Row) and not problem_of(row):
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
