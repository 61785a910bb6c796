"""Which local files a config's dataset is read from, for all who look at them besides training."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config.lazy import LazyAttr, LazyObject

from xtuner.dataset.reading import Row, Unreadable, find_files, problem_of, read_rows
from xtuner.utils.data_files import SUFFIXES_OF, kind_of, loader_meant, loader_of, split_names
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

PathsSetting = str | Path | Mapping[str, Any] | Sequence[str | Path] | None
"""Paths as a config gives them."""


@dataclass(frozen=True)
class LocalFiles:
    """Files of rows.

    Attributes:
        paths: files, folders and patterns, as the config gives them.
        field: of a JSON file that is one object: the key that holds the rows.
        delimiter: of the columns of csv files, as ``load_dataset`` takes it; None for other files.
    """

    paths: list[str]
    field: str | None = None
    delimiter: str | None = None


def name_of(kind: object) -> str:
    """The last word of a builder's or function's name, given as an object, lazily or as text."""
    return dotted_name(kind).rpartition(".")[2]


def dotted_name(kind: object) -> str:
    """The whole name of a builder or function, with its module where it is known."""
    if isinstance(kind, LazyObject | LazyAttr):
        return f"{kind.module}.{kind}"
    if isinstance(kind, str):
        return kind
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', kind)}"


def paths_in(value: PathsSetting) -> list[str]:
    """Paths given as one text, a list, or a dict of splits (of which ``train`` is taken)."""
    if isinstance(value, Mapping):
        value = value.get("train") or [path for paths in value.values() for path in paths_in(paths)]
    if value is None:
        return []
    if not isinstance(value, str | Path | list | tuple):
        raise UserError(
            tr("{value!r} is no path", value=value), hint="data_files=dict(train='data.json')"
        )
    return [str(path) for path in ([value] if isinstance(value, str | Path) else value)]


def local_files(source: Mapping[str, Any]) -> LocalFiles | None:
    """The files behind a dataset's settings; None for a dataset of the hub or another builder.

    Args:
        source: ``dict(type=load_dataset, ...)`` or the settings of another loader.

    Raises:
        UserError: when a loader of files has none, or files of another format.
    """
    loader, path = name_of(source.get("type", "")), str(source.get("path", ""))
    files = of_split(source, None).get("data_files") or source.get("data_dir")
    if isinstance(files, Mapping) and source.get("split"):
        files = [each for paths in files.values() for each in paths_in(paths)]
    if loader in ("load_jsonl_dataset", "load_json_file"):
        return LocalFiles(paths_in(files))
    if loader != "load_dataset":
        return None
    if files and (meant := loader_meant(path)):
        raise UserError(
            tr("there is no loader {path!r}", path=path),
            hint=tr("use path={path!r}.", path=meant),
            where=Where(key="path"),
        )
    if path not in SUFFIXES_OF:
        return (
            LocalFiles(paths_in(source.get("data_files") or path)) if Path(path).is_dir() else None
        )
    folder = source.get("data_dir") if source.get("data_files") else None
    paths = paths_in(files)
    if not paths:
        raise UserError(
            tr("load_dataset(path={path!r}) has no data_files", path=path),
            hint="data_files=dict(train='data.json')",
        )
    if any("://" in each for each in paths):
        return None
    paths = [str(Path(folder) / each) for each in paths] if folder else paths
    _check_format(path, paths)
    delimiter = source.get("sep") or source.get("delimiter") or ","
    return LocalFiles(paths, source.get("field"), delimiter if path == "csv" else None)


def split_of(source: Mapping[str, Any], split: str | None) -> str:
    """The split that is read: the loader's own, else the dataset's."""
    return str(source.get("split") or split or "train")


def is_whole(split: str) -> bool:
    """Whether a split is one name."""
    return not any(sign in split for sign in "[+") and split != "all"


def of_split(source: Mapping[str, Any], split: str | None) -> Mapping[str, Any]:
    """A loader's settings with the files of the split alone; a fault of others ends no run.

    Args:
        source: ``dict(type=load_dataset, ...)``.
        split: of the dataset.
    """
    named = source.get("data_files")
    if not isinstance(named, Mapping):
        return source
    names = split_names(split_of(source, split), named)
    if not all(name in named for name in names):
        return source
    return {**source, "data_files": {name: named[name] for name in names}}


def files_of_splits(source: Mapping[str, Any], split: str | None) -> dict[str, LocalFiles] | None:
    """The local files of each split whose rows are read.

    Returns:
        None where the rows are not read from local files, or there is no such split.
    """
    whole = local_files(source)
    if whole is None:
        return None
    named = source.get("data_files")
    files: dict[str, LocalFiles | None] = {"train": whole}
    if isinstance(named, Mapping):
        files = {
            name: local_files({**source, "data_files": {name: paths}})
            for name, paths in named.items()
        }
    found = {name: files.get(name) for name in split_names(split_of(source, split), files)}
    return {name: each for name, each in found.items() if each} if all(found.values()) else None


@dataclass(frozen=True)
class SplitRows:
    """The rows of a split, in the order of the dataset that is loaded from it.

    Attributes:
        files: of each split that it is made of.
        split: what is taken of them.
    """

    files: Mapping[str, LocalFiles]
    split: str

    def __call__(self) -> Iterator[Row | Unreadable]:
        """The rows, and once each what cannot be used in the files: loading fails for it."""
        if is_whole(self.split):
            for each in self.files.values():
                yield from rows_of_files(each)
            return
        said = set()
        for name, start, stop in slices_of(self.split, self._counts()):
            number = 0
            for row in rows_of_files(self.files[name]):
                if problem_of(row):
                    if name not in said:
                        yield row
                    continue
                if start <= number < stop:
                    yield row
                number += 1
            said.add(name)

    def _counts(self) -> dict[str, int]:
        return {
            name: sum(not problem_of(row) for row in rows_of_files(files))
            for name, files in self.files.items()
        }


def rows_of_files(files: LocalFiles) -> Iterator[Row | Unreadable]:
    """The rows of files, and what cannot be read."""
    for file in find_files(files.paths):
        yield from read_rows(file, field=files.field, delimiter=files.delimiter)


def slices_of(split: str, counts: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """The split, the first row and the row after the last one of each part.

    Args:
        split: as ``load_dataset`` takes it.
        counts: the rows of each split.

    Raises:
        UserError: for what is written in another way.
    """
    from datasets import ReadInstruction

    if split == "all":
        return [(name, 0, count) for name, count in counts.items()]
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(counts)
    except (ValueError, AssertionError) as error:
        raise UserError(
            tr("the split {split!r} cannot be read: {error}", split=split, error=error),
            hint="train, train[:100], train[10%:20%], train+validation",
            where=Where(key="split"),
        ) from error
    return [(part.splitname, part.from_, part.to) for part in parts]


_TALKS = frozenset({"messages", "conversation", "conversations", "history", "tools"})
_FIELDS_OF_ROWS = frozenset(
    {"messages", "conversation", "conversations", "instruction", "input", "output", "text"}
    | {"prompt", "question", "query", "chosen"}
)


def loader_hint(row: Mapping[str, Any]) -> str:
    """The argument of ``load_dataset`` without which a file was read as this row; or nothing."""
    if len(row) == 1 and (sign := next((s for s in "\t;|" if s in next(iter(row))), "")):
        return tr(
            "the columns are separated by {sign!r}: load_dataset(..., sep={sign!r})", sign=sign
        )
    holders = {
        name: value
        for name, value in row.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    }
    if len(holders) != 1 or not _TALKS.isdisjoint(row):
        return ""
    ((name, rows),) = holders.items()
    if len(row) > 1 and _FIELDS_OF_ROWS.isdisjoint(rows[0]):
        return ""
    return tr("the rows are inside: load_dataset(..., field={name!r})", name=name)


def is_odd(path: str) -> bool:
    """Whether ``datasets`` does not find a path: a folder, or a file named like a pattern."""
    return Path(path).is_dir() or (Path(path).is_file() and glob.escape(path) != path)


def as_files(value: PathsSetting) -> Any:
    """``data_files`` as ``datasets`` finds them: a folder as its files, a name that looks like a
    pattern as the file that has it."""
    if isinstance(value, Mapping):
        return {split: as_files(paths) for split, paths in value.items()}
    return [found for path in paths_in(value) for found in _as_files(path)]


def _as_files(path: str) -> list[str]:
    if Path(path).is_dir():
        return [glob.escape(file) for file in find_files([path])]
    return [glob.escape(path) if Path(path).is_file() else path]


def _named_by(path: str) -> list[str]:
    """The files that a path stands for; itself where there are none."""
    try:
        return find_files([path])
    except UserError:
        return [path]


def _check_format(path: str, files: list[str]) -> None:
    """Refuse files whose suffix belongs to another loader: it would fail with a traceback."""
    for file in (found for each in files for found in _named_by(each)):
        right = loader_of(file) or path
        if right != path:
            raise UserError(
                tr(
                    "load_dataset(path={path!r}) cannot read a {suffix} file",
                    path=path,
                    suffix=kind_of(file),
                ),
                hint=tr("use path={path!r}.", path=right),
                where=Where(file),
            )
