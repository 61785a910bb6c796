"""Rows of a ``datasets.Dataset`` with images and videos as they are stored: bytes or paths."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


class SourceRows:
    """The rows of a dataset, read without decoding images and videos.

    Args:
        dataset: a ``datasets.Dataset``.
    """

    def __init__(self, dataset: Dataset) -> None:
        features = copy.deepcopy(dataset.features)
        for feature in features.values():
            _keep_stored(feature)
        self._features = type(features)(features)
        self._table = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of these numbers."""
        columns = self._table[list(numbers)].to_pydict()
        decoded = self._features.decode_batch(columns)
        values = zip(*decoded.values(), strict=True)
        return [dict(zip(decoded, row, strict=True)) for row in values]

    def at_once(self, most: int, size: int) -> int:
        """How many rows have about so many bytes.

        Args:
            most: rows at most.
            size: bytes.
        """
        data = self._table.data
        return max(1, min(most, size * data.num_rows // max(1, data.nbytes)))


def _keep_stored(feature: object) -> None:
    """Switch the decoding of images and videos off in a feature and all that it holds."""
    from datasets import Image, Video

    if isinstance(feature, Image | Video):
        feature.decode = False
    elif isinstance(feature, Mapping):
        for inner in feature.values():
            _keep_stored(inner)
    elif isinstance(feature, list | tuple):
        for inner in feature:
            _keep_stored(inner)
    elif hasattr(feature, "feature"):
        _keep_stored(feature.feature)
