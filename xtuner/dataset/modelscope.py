"""Datasets of ModelScope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xtuner.dataset.huggingface import process_hf_dataset
from xtuner.registry import BUILDER
from xtuner.utils.errors import require

if TYPE_CHECKING:
    from datasets import Dataset


def process_ms_dataset(dataset: Any, split: str = "train", **settings: Any) -> Dataset:
    """Prepare a dataset of ModelScope for training.

    Args:
        dataset: an ``MsDataset`` or the config to load it.
        split: which part to take.
        **settings: as for ``process_hf_dataset``.

    Raises:
        UserError: when the package modelscope is not installed.
    """
    if isinstance(dataset, Mapping):
        require("modelscope", extra="modelscope", purpose="process_ms_dataset")
        dataset = BUILDER.build(dict(dataset))
    if hasattr(dataset, "to_hf_dataset"):
        dataset = dataset.to_hf_dataset()
    return process_hf_dataset(dataset, split=split, **settings)
