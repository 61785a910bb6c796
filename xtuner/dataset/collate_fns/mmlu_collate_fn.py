"""Batches for the MMLU metric: padded prompts, and each row's subject and answer beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.dataset.collate_fns.default_collate_fn import default_collate_fn
from xtuner.utils.constants import DEFAULT_PAD_TOKEN_INDEX


def mmlu_collate_fn(
    instances: Sequence[Mapping[str, Any]],
    pad_index: int = DEFAULT_PAD_TOKEN_INDEX,
    return_hf_format: bool = False,
) -> dict[str, Any]:
    """Make a batch of multiple-choice questions.

    Args:
        instances: rows with ``input_ids``, ``labels``, ``subject`` and ``output`` (the letter).
        pad_index: id that padding gets.
        return_hf_format: give the tensors alone.

    Returns:
        ``{'data': tensors, 'data_samples': {'labels': ..., 'subjects': ..., 'gold': ...}}``.
    """
    batch = default_collate_fn(instances, pad_index, return_hf_format)
    if return_hf_format:
        return batch
    batch["data_samples"] = {
        "labels": batch["data"]["labels"],
        "subjects": [row.get("subject") for row in instances],
        "gold": [row.get("output") for row in instances],
    }
    return batch
