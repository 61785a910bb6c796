"""Sizes of the blocks of a fused cross-entropy on a CPU."""

from __future__ import annotations

from xtuner.model.backends.cross_entropy import BlockSizes
from xtuner.utils.cpu import pad_to_bucket

SIZES = BlockSizes(
    logits=2**23,  # 16 MiB in bfloat16
    min_columns=512,
    kept_logits=2**25,
    part_logits=2**18,  # 1 MiB in float32 stays in the cache
    padded_rows=pad_to_bucket,
    min_rows=128,
    kept_with_gradient=True,
)
