"""Sizes of the blocks of a fused cross-entropy on a GPU."""

from __future__ import annotations

from xtuner.model.backends.cross_entropy import BlockSizes

SIZES = BlockSizes(
    # The gradient of the hidden states is read and written in float32 once for each block: there
    # should be few. 256 MiB in bfloat16.
    logits=2**27,
    min_columns=512,
    kept_logits=2**27,
    part_logits=2**24,  # 64 MiB in float32, of which there are up to three at a time
    most_parts=16,  # each part is some fifteen launches
)
