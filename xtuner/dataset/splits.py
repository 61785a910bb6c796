"""Which rows of local files a split takes: ``train``, ``train[:100]``, ``train+validation``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xtuner.dataset.reading import Row, Unreadable, find_files, problem_of, read_rows
from xtuner.dataset.sources import LocalFiles, is_whole, local_files, split_of
from xtuner.utils.data_files import split_names
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr


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
