"""Where rows come from and what is called for each: the values that a config may give for both."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from xtuner.dataset.prepare.json_columns import (
    are_json,
    has_json_columns,
    is_as_written,
    json_features,
    needs_reading,
    rows_as_written,
)
from xtuner.dataset.prepare.token_stats import FIRST_ROWS, TokenStats
from xtuner.dataset.reading import (
    Row,
    Unreadable,
    find_files,
    kind_of,
    problem_of,
    read_rows,
    unreadable,
)
from xtuner.dataset.sources import (
    LocalFiles,
    SplitRows,
    as_files,
    files_of_splits,
    is_odd,
    local_files,
    of_split,
    rows_of_files,
    split_of,
)
from xtuner.registry import BUILDER
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from datasets import Dataset, Features


class RowPlaces:
    """Where each row of a dataset stands, by its number; the files are read when first asked.

    Args:
        dataset: the config that the dataset is built from, or the dataset.
        split: of a ``DatasetDict``.
        usable: the rows that are not objects were left out.
    """

    def __init__(self, dataset: object, split: str | None, *, usable: bool = False) -> None:
        self._rows = _split_rows(dataset, split)
        self._usable = usable
        self._starts: list[tuple[str, list[int]]] | None = None

    def __call__(self, number: int) -> Where | None:
        """File and line of a row; None where it is not known."""
        if self._rows is None:
            return None
        if self._starts is None:
            rows = filter(self._is, self._rows())
            self._starts = [
                (file, [row.line for row in of_file])
                for file, of_file in groupby(rows, key=attrgetter("file"))
            ]
        for file, lines in self._starts:
            if number < len(lines):
                return Where(file, lines[number])
            number -= len(lines)
        return None

    def _is(self, row: Row | Unreadable) -> bool:
        return not problem_of(row) if self._usable else isinstance(row, Row)


def load_usable_rows(
    dataset: Any, split: str | None, bad_rows: str, *, as_text: bool = False
) -> tuple[Dataset, RowPlaces, TokenStats]:
    """``load_rows``, with a policy for lines of local files that cannot be read or are no objects.

    Args:
        dataset: as for ``load_rows``.
        split: of a ``DatasetDict``.
        bad_rows: ``error``, or ``drop`` to leave them out.
        as_text: as for ``load_rows``.

    Returns:
        The rows, their places, and what was left out.

    Raises:
        UserError: when the dataset cannot be loaded for another reason, or no line can be read.
    """
    try:
        return load_rows(dataset, split, as_text=as_text), RowPlaces(dataset, split), TokenStats()
    except UserError:
        rows = _split_rows(dataset, split) if bad_rows == "drop" else None
        if rows is None:
            raise
        bad, has_usable = [], False
        for row in rows():
            if isinstance(row, Unreadable) and row.ends_file:
                raise
            if problem_of(row):
                bad.append(row)
            else:
                has_usable = True
        if not bad or not has_usable:
            raise
    stats = TokenStats(
        rows_in=len(bad),
        dropped={"unreadable": [row.line for row in bad]},
        bad_rows=[f"{row.file}:{row.line}: {problem_of(row)}" for row in bad[:FIRST_ROWS]],
    )
    return rows_as_written(rows.files, rows.split), RowPlaces(dataset, split, usable=True), stats


def _split_rows(dataset: object, split: str | None) -> SplitRows | None:
    """The rows of local files that a config's dataset has; None where that is not known."""
    if not isinstance(dataset, Mapping) or "type" not in dataset:
        return None
    files = files_of_splits(dataset, split)
    return None if files is None else SplitRows(files, split_of(dataset, split))


_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def load_rows(dataset: Any, split: str | None, *, as_text: bool = False) -> Dataset:
    """The rows that a config's dataset stands for.

    Args:
        dataset: a ``datasets.Dataset`` or ``DatasetDict``, or the config to build it from.
        split: of a ``DatasetDict``.
        as_text: cells of csv files are texts as they are written: ``007`` is no number.

    Raises:
        UserError: when they cannot be loaded, or there is no such split.
    """
    from datasets import DatasetDict

    if isinstance(dataset, Mapping) and "type" in dataset:
        dataset = _loaded(dataset, split, as_text)
    if not isinstance(dataset, DatasetDict):
        return dataset
    if split not in dataset:
        raise UserError(
            tr("the dataset has no split {split!r}", split=split),
            hint=", ".join(map(str, dataset)),
            where=Where(key="split"),
        )
    return dataset[split]


def _loaded(source: Mapping[str, Any], split: str | None, as_text: bool) -> Any:
    """What a loader gives; where it fails, the error names the file and line that it fails at."""
    from datasets.exceptions import DatasetsError

    source = of_split(source, split)
    files = local_files(source)
    if files is not None:
        source = _with_read_settings(source, files, as_text)
    try:
        dataset = BUILDER.build(dict(source))
        if files is not None:  # the JSON reader takes bytes that are not UTF-8 for text
            _validate(dataset)
        if files is None or not are_json(files):
            return dataset
        return _texts_as_written(dataset, source, split, files)
    except UserError:
        raise
    except Exception as error:  # datasets, Arrow, pandas and decompressors raise many kinds
        # StopIteration: how datasets says that a file is empty.
        known = (DatasetsError, OSError, ValueError, EOFError, StopIteration, ImportError)
        if files is None and not isinstance(error, known):
            raise  # a mistake in the user's own loader
        _require_writable(error)
        if files is not None:
            _name_the_line(files)
            rows = _as_written(source, split) if are_json(files) else None
            if rows is not None:
                return rows
        raise UserError(
            tr("the dataset cannot be loaded: {error}", error=_first_line(error)),
            hint=tr("your own files: dict(type=load_dataset, path='json', data_files='my.jsonl')"),
            where=Where(key="dataset"),
        ) from error


def _with_read_settings(
    source: Mapping[str, Any], files: LocalFiles, as_text: bool
) -> Mapping[str, Any]:
    """The settings of a loader of files that make it read what the files say.

    Raises:
        UserError: for files that it would misread.
    """
    if source.get("data_files") and any(map(is_odd, files.paths)):
        source = {**source, "data_files": as_files(source["data_files"])}
    if source.get("path") == "csv":
        source = {"keep_default_na": False, **source}  # the text "NA" is a text
    if any(map(_is_read_first, find_files(files.paths))):
        _name_the_line(files)
        if as_text and files.delimiter and _HEADER_SETTINGS.isdisjoint(source):
            return {**source, "features": _texts(files)}
    return source


def _texts_as_written(
    loaded: Any, source: Mapping[str, Any], split: str | None, files: LocalFiles
) -> Any:
    """What was loaded of JSON files, read anew where texts have become something else."""
    table = loaded.get(split) if isinstance(loaded, Mapping) else loaded
    rows = _split_rows(source, split)
    if table is None or rows is None:
        return loaded
    if not has_json_columns(table) and is_as_written(table, rows):
        return loaded
    _name_the_line(files)
    if "features" in source:
        return BUILDER.build({**source, "features": json_features([files])})
    return rows_as_written(rows.files, rows.split)


def _as_written(source: Mapping[str, Any], split: str | None) -> Dataset | None:
    """The rows of a split as its files have them; None where the config decides how it is read."""
    rows = None if "features" in source else _split_rows(source, split)
    return None if rows is None else rows_as_written(rows.files, rows.split)


_HEADER_SETTINGS = frozenset({"features", "column_names", "names", "header", "skiprows", "dtype"})


def _texts(files: LocalFiles) -> Features:
    """The columns of csv files as texts."""
    from datasets import Features, Value

    first = next(rows_of_files(files))
    assert isinstance(first, Row)  # every row has been read
    return Features(dict.fromkeys(first.value, Value("string")))


def _is_read_first(file: str) -> bool:
    kind = kind_of(file)
    if kind in (".csv", ".tsv"):
        return True  # pandas shifts the columns of a line that has too many
    return kind in (".json", ".jsonl", ".txt") and needs_reading(file)


def _require_writable(error: BaseException) -> None:
    """Refuse a cache of ``datasets`` that cannot be written: the rows are not at fault."""
    for each in (error, error.__cause__, error.__context__):
        if isinstance(each, OSError) and each.errno in _OF_THE_DISK:
            from datasets import config

            raise UserError(
                tr("the cache of datasets cannot be written: {why}", why=each.strerror or each),
                hint=tr("make room there, or HF_DATASETS_CACHE=/another/folder."),
                where=Where(str(config.HF_DATASETS_CACHE)),
            ) from error


def _validate(dataset: object) -> None:
    """Raise ``ValueError`` (Arrow's) where a column of text is not UTF-8."""
    for part in dataset.values() if isinstance(dataset, Mapping) else [dataset]:
        if hasattr(part, "data"):
            part.data.validate(full=True)


def _name_the_line(files: LocalFiles) -> None:
    """Refuse files at the first row that cannot be read, if there is one."""
    for file in find_files(files.paths):
        is_empty = True
        for row in read_rows(file, field=files.field, delimiter=files.delimiter):
            if why := problem_of(row):
                raise unreadable(why, file, row.line)
            is_empty = False
        if is_empty:
            raise UserError(tr("the file has no rows"), where=Where(file))


def _first_line(error: BaseException) -> str:
    """The cause of an error in one line: ``datasets`` wraps what the reader said in its own."""
    cause = error.__cause__ or error
    return str(cause).partition("\n")[0] or type(cause).__name__
