"""Padded rows as the samples of one packed row, before a micro-batch is copied to a GPU.

There the variable-length kernels compute packed rows, nothing is computed for padding, and no layer
has to ask where it is. All is done on the CPU, where the lengths are known without waiting.

Shapes: B rows of S tokens, T tokens without padding.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch

from xtuner.utils.types import Batch

BY_TOKEN: tuple[Literal["input_ids", "labels", "position_ids"], ...]
BY_TOKEN = ("input_ids", "labels", "position_ids")


def unpadded(data: Batch) -> Batch:
    """Join the rows of a batch into a packed row, without their padding.

    Args:
        data: ``input_ids`` and what else there is for each token (B, S), with an
            ``attention_mask``, on the CPU.

    Returns:
        The same as one row (1, T) of B samples; ``position_ids`` are counted anew where there are
        none.
    """
    tokens = data["attention_mask"] != 0
    lengths = tokens.sum(1)
    packed: Batch = {**data}
    del packed["attention_mask"]
    for name in BY_TOKEN:
        if name in data:
            packed[name] = data[name][tokens][None]
    if "position_ids" not in data:
        counted = [torch.arange(int(length)) for length in lengths]
        packed["position_ids"] = torch.cat(counted)[None]
    boundaries = [0, *itertools.accumulate(lengths.tolist())]
    packed["cumulative_len"] = [torch.tensor(boundaries, dtype=torch.int32)]
    packed["max_seqlen"] = int(lengths.max())
    return packed
