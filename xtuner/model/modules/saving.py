"""Saving a transformers model with weights of another dtype than it has in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_weights(
    model: PreTrainedModel,
    folder: Path,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    max_shard_size: int | str,
) -> None:
    """Write a model folder whose ``config.json`` has the dtype of the weights.

    Args:
        model: transformers alone would write the dtype that it has in
            memory, by which the folder would then be loaded.
        folder: to write.
        weights: by name, in place of the model's own.
        dtype: of the weights; None where it is the model's.
        max_shard_size: of a file.
    """
    model.save_pretrained(folder, state_dict=dict(weights), max_shard_size=max_shard_size)
    if dtype is not None:
        config = copy.deepcopy(model.config)
        config.dtype = dtype
        config.save_pretrained(folder)
