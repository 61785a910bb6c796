"""Where rows come from and what is called for each: the values that a config may give for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from xtuner.registry import BUILDER, MAP_FUNC
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from datasets import Dataset

RowFunction = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def load_rows(dataset: Any, split: str | None) -> Dataset:
    """The rows that a config's dataset stands for.

    Args:
        dataset: a ``datasets.Dataset`` or ``DatasetDict``, or the config to build it from.
        split: of a ``DatasetDict``.

    Raises:
        UserError: when they cannot be loaded, or there is no such split.
    """
    from datasets import DatasetDict

    if isinstance(dataset, Mapping) and "type" in dataset:
        try:
            dataset = BUILDER.build(dict(dataset))
        except (FileNotFoundError, ConnectionError, ValueError) as error:
            raise UserError(
                tr("the dataset cannot be loaded: {error}", error=error),
                hint=tr(
                    "your own files: dict(type=load_dataset, path='json', data_files='my.jsonl')"
                ),
                where=Where(key="dataset"),
            ) from error
    if not isinstance(dataset, DatasetDict):
        return dataset
    if split not in dataset:
        raise UserError(
            tr("the dataset has no split {split!r}", split=split),
            hint=", ".join(map(str, dataset)),
            where=Where(key="split"),
        )
    return dataset[split]


def row_function(function: Any) -> RowFunction | None:
    """A row function from what a config may hold: itself, its registered name, or its builder."""
    if isinstance(function, str):
        found = MAP_FUNC.get(function)
        if found is None:
            raise UserError(
                tr("there is no map function {function!r}", function=function),
                where=Where(key="dataset_map_fn"),
            )
        return found
    if isinstance(function, Mapping):
        return BUILDER.build(dict(function))
    return function
