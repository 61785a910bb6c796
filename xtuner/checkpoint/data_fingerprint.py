"""A checksum of the rows of a dataset, over all their columns."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

SAMPLED_ROWS = 64


@runtime_checkable
class IndexedRows(Protocol):
    """A dataset with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Any: ...


@dataclass(frozen=True)
class DataFingerprint:
    """Two datasets with the same fingerprint have the same rows.

    Args:
        rows: how many there are.
        content: SHA-256 over the values of all columns, of all rows or of evenly spread ones.
    """

    rows: int
    content: str

    @classmethod
    def of(cls, dataset: IndexedRows, sampled: int | None = SAMPLED_ROWS) -> DataFingerprint:
        """Compute the fingerprint of a dataset.

        Args:
            dataset: its rows are mappings of numbers, texts, lists, arrays and tensors. Of arrays
                of floats with three or more dimensions (images) shape and mean are taken, as the
                last bits of their values depend on the processor.
            sampled: how many rows, evenly spread, to look at; None for all.
        """
        dataset = getattr(dataset, "table", None) or dataset  # reading rows may decode images
        count = len(dataset)
        looked_at = count if sampled is None else min(sampled, count)
        digest = hashlib.sha256()
        for number in range(looked_at):
            for part in _encoded(dataset[number * count // looked_at]):
                digest.update(part)
        return cls(count, digest.hexdigest())


def _encoded(value: object) -> Sequence[bytes]:
    """A value as bytes: equal for equal lists, arrays and tensors, with lengths and types."""
    if isinstance(value, Mapping):
        parts = [b"{%d" % len(value)]
        for key in sorted(value, key=str):
            parts += [str(key).encode(), b"=", *_encoded(value[key])]
        return parts
    if isinstance(value, str | bytes):
        text = value.encode() if isinstance(value, str) else value
        return [b"s%d:" % len(text), text]
    array = _as_array(value)
    if array is not None:
        return _encoded_array(array)
    if isinstance(value, list | tuple):
        return [b"[%d" % len(value), *(part for item in value for part in _encoded(item))]
    return [type(value).__name__.encode()]


def _as_array(value: object) -> np.ndarray[Any, Any] | None:
    """Numbers, and what consists of them, as int64 or float64; None for anything else."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu()
        value = plain.double().numpy() if plain.is_floating_point() else plain.numpy()
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # rows of different lengths
        return None
    if array.dtype.kind in "iub":
        return array.astype(np.int64)
    return array.astype(np.float64) if array.dtype.kind == "f" else None


def _encoded_array(array: np.ndarray[Any, Any]) -> Sequence[bytes]:
    head = f"{array.dtype.kind}{array.shape}".encode()
    if array.dtype.kind == "f" and array.ndim >= 3:
        return [head, f"{array.mean() if array.size else 0.0:.2f}".encode()]
    return [head, np.ascontiguousarray(array).tobytes()]
