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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.dataset.json_stream import LONGEST, has_lines
from xtuner.dataset.reading import (
    READ_ERRORS,
    Row,
    Unreadable,
    decoded,
    find_files,
    kind_of,
    open_file,
    problem_of,
)
from xtuner.dataset.sources import LocalFiles, SplitRows, is_whole, rows_of_files, slices_of
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

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
    row, however long: lines of more than ``LONGEST`` bytes are read first, with a limit. So are
    JSON files without a row on each line, for which it has parsers that accept what is no JSON, and
    what cannot be read at all.
    """
    before, length, is_one_line = b"\n", 0, kind_of(file) != ".txt"
    try:
        if is_one_line and not _has_lines(file):
            return True
        with open_file(file) as raw:
            while block := raw.read(BLOCK):
                text = before + block
                if any(_may_be_row(text, match.start()) for match in re.finditer(b"null", text)):
                    return True
                before = text[-CONTEXT:]
                is_one_line = is_one_line and b"\n" not in block.rstrip()
                length = length + len(block) if b"\n" not in block else len(block)
                if length > LONGEST:
                    return True
    except READ_ERRORS:
        return True
    return is_one_line


def _has_lines(file: str) -> bool:
    with open_file(file) as raw:
        return has_lines(decoded(raw, newline="\n"), is_jsonl=kind_of(file) == ".jsonl")


def _may_be_row(text: bytes, start: int) -> bool:
    """Whether a ``null`` may be a row, by what stands before it: no key, and no other value."""
    left = text[max(0, start - CONTEXT) : start].rstrip(b" \t\r")
    return left.endswith((b"\n", b"[", b"},", b"null,"))


def json_features(splits: Iterable[LocalFiles]) -> Any:
    """``datasets.Features`` of the files' columns: those of nothing but texts, and ``Json``.

    Args:
        splits: the files of each split.

    Raises:
        UserError: where no row has a field.
    """
    from datasets import Features, Json, Value

    has_others: dict[str, bool] = {}
    for row in _objects(row for files in splits for row in rows_of_files(files)):
        for name, value in row.items():
            is_other = value is not None and not isinstance(value, str)
            has_others[name] = has_others.get(name, False) or is_other
    if not has_others:
        file = next((path for files in splits for path in files.paths), None)
        raise UserError(tr("no row has a field"), where=Where(file))
    return Features(
        {name: Json() if other else Value("string") for name, other in has_others.items()}
    )


def has_json_columns(dataset: Dataset) -> bool:
    """Whether ``datasets`` keeps values as JSON text, where the text ``true`` is a switch again."""
    return "Json(" in str(getattr(dataset, "features", ""))


def rows_as_written(splits: Mapping[str, LocalFiles], split: str) -> Dataset:
    """The rows of a split, read here, each value as it is written.

    Rows that cannot be read are left out.

    Args:
        splits: the files of each split that it is made of.
        split: such as ``train`` or ``train[:100]``.

    Raises:
        UserError: for a split that is written in another way, and where no row has a field.
    """
    from datasets import concatenate_datasets

    features = json_features(splits.values())
    tables = {name: _rows_as_written(files, features) for name, files in splits.items()}
    if is_whole(split):
        return tables[split]
    parts = slices_of(split, {name: len(table) for name, table in tables.items()})
    return concatenate_datasets(
        [tables[name].select(range(start, stop)) for name, start, stop in parts]
    )


def _rows_as_written(files: LocalFiles, features: Any) -> Dataset:
    from datasets import Dataset, Json

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
    files = replace(files, paths=[file for file, _, _ in states])
    for row in _objects(rows_of_files(files)):
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


def is_as_written(dataset: Dataset, rows: SplitRows) -> bool:
    """Whether a loaded dataset has the texts of its files.

    Args:
        dataset: as it was loaded.
        rows: of its files.
    """
    if not hasattr(dataset, "data") or dataset._indices is not None:
        return True
    suspicious: dict[int, list[str]] = {}
    for column in dataset.data.columns:
        for number, text in islice(_quoted(column), ROWS_COMPARED):
            suspicious.setdefault(number, []).append(text)
    if not suspicious:
        return True
    for number, row in enumerate(islice(_objects(rows()), max(suspicious) + 1)):
        if number in suspicious and not set(suspicious[number]) <= set(_texts(row)):
            return False
    return True


def _objects(rows: Iterable[Row | Unreadable]) -> Iterator[dict[str, Any]]:
    for row in rows:
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
