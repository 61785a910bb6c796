"""Pairs of answers → one batch of tensors, padded or packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.dataset.collate_fns.default_collate_fn import default_collate_fn
from xtuner.utils.constants import (
    DEFAULT_PAD_TOKEN_INDEX,
    PREFERENCE_SIDES,
    REFERENCE_COLUMNS,
)


def preference_collate_fn(
    instances: Sequence[Mapping[str, Any]],
    pad_index: int = DEFAULT_PAD_TOKEN_INDEX,
    return_hf_format: bool = False,
    use_varlen_attn: bool = False,
) -> dict[str, Any]:
    """Make a batch in which chosen and rejected answers take turns.

    Args:
        instances: rows of ``build_preference_dataset``.
        pad_index: id that padding gets.
        return_hf_format: give the tensors alone.
        use_varlen_attn: the rows are joined into one row whose answers do not see each other.

    Returns:
        As ``default_collate_fn``; of 2 B rows (or packed samples) every second one is a rejected
        answer. Where rows have ``REFERENCE_COLUMNS`` (a value, of a packed
        row one for each pair), the data have them as lists of P floats.
    """
    samples = [sample for row in instances for sample in _samples(row)]
    batch = default_collate_fn(samples, pad_index, return_hf_format, use_varlen_attn)
    data = batch if return_hf_format else batch["data"]
    for name in REFERENCE_COLUMNS:
        if all(name in row for row in instances):
            data[name] = [float(value) for row in instances for value in _as_list(row[name])]
    return batch


def _as_list(values: float | Sequence[float]) -> Sequence[float]:
    """The values of a row; of a single pair it may be one number, as TRL writes it."""
    return values if isinstance(values, Sequence) else [values]


def _samples(row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """A packed row as it is; the two answers of a pair as samples of their own."""
    if "input_ids" in row:
        return [row]
    samples: list[dict[str, Any]] = [
        {"input_ids": row[f"{side}_ids"], "labels": row[f"{side}_labels"]}
        for side in PREFERENCE_SIDES
    ]
    samples[0] |= {key: row[key] for key in ("rows", "part") if key in row}
    return samples
