"""Several datasets one after the other, as one."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch.utils.data import ConcatDataset as TorchConcatDataset

from xtuner.registry import BUILDER

if TYPE_CHECKING:
    from datasets import Dataset


class ConcatDataset(TorchConcatDataset[Any]):
    """The rows of all datasets.

    Args:
        datasets: datasets, or the configs to build them from.
    """

    def __init__(self, datasets: Sequence[Any]) -> None:
        built = [BUILDER.build(dict(d)) if isinstance(d, Mapping) else d for d in datasets]
        super().__init__(built)

    def __getitem__(self, index: int) -> Any:
        row = super().__getitem__(index)
        if isinstance(row, dict) and "rows" in row:  # their numbers count within one dataset
            row["part"] = bisect.bisect_right(self.cumulative_sizes, index % len(self))
        return row

    @property
    def length(self) -> list[int]:
        """Tokens of each row, as length-grouped sampling asks for."""
        return self._joined("length")

    @property
    def modality_length(self) -> list[int]:
        """Tokens of each row, negative for rows without an image."""
        return self._joined("modality_length")

    @property
    def table(self) -> ConcatDataset | None:
        """The rows as they are stored, where reading them here decodes images; else None."""
        if not any(hasattr(dataset, "table") for dataset in self.datasets):
            return None
        return ConcatDataset([getattr(dataset, "table", dataset) for dataset in self.datasets])

    def _joined(self, name: str) -> list[int]:
        return list(itertools.chain.from_iterable(_property(d, name) for d in self.datasets))

    def __repr__(self) -> str:
        sizes = ", ".join(str(len(dataset)) for dataset in self.datasets)  # type: ignore[arg-type]
        return f"ConcatDataset({len(self)} rows = {sizes})"


def _property(dataset: Dataset, name: str) -> Sequence[int]:
    """What a dataset says of its rows: an attribute, or a column."""
    columns = getattr(dataset, "column_names", ())
    return list(dataset[name]) if name in columns else list(getattr(dataset, name))
