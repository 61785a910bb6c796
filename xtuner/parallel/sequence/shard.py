"""What a rank computes of a micro-batch: its shard of the tokens of each row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xtuner.parallel.sequence.collectives import all_reduce_sum
from xtuner.parallel.sequence.groups import get_sequence_parallel_group
from xtuner.parallel.sequence.padding import missing, padded
from xtuner.utils.cpu import pad_to_bucket

BY_TOKEN = ("input_ids", "inputs_embeds")


class SequenceShard:
    """This rank's shard of rows of ``length`` tokens; the whole rows where they are not shared.

    Every rank of the group has the whole micro-batch. Rows are padded at their end to a multiple of
    the ranks; rank r computes the r-th shard.

    Args:
        length: S.
        group: the ranks that share the rows; those of ``init_sequence_parallel`` by default.
        bucketed: pad shards to a bucketed length (``pad_to_bucket``), for packed rows on a CPU:
            another length costs new code and fits no gap of memory. The padding is a sample of its
            own.
    """

    def __init__(
        self, length: int, group: dist.ProcessGroup | None = None, bucketed: bool = False
    ) -> None:
        self.group = get_sequence_parallel_group() if group is None else group
        self.size = 1 if self.group is None else dist.get_world_size(self.group)
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.length = length
        self.padding = missing(length, self.size)
        if bucketed:
            tokens = (length + self.padding) // self.size
            self.padding += (pad_to_bucket(tokens) - tokens) * self.size
        self.is_whole = self.size == 1 and not self.padding
        self.tokens = (length + self.padding) // self.size
        self.start = self.rank * self.tokens

    def shard(self, rows: Tensor, value: float = 0) -> Tensor:
        """This rank's shard of (B, S, ...), with ``value`` in the padding: (B, S/N, ...)."""
        if self.is_whole:
            return rows
        return padded(rows, self.padding, value, 1)[:, self.start : self.start + self.tokens]

    def add(self, values: Tensor) -> Tensor:
        """Add over the ranks; the ranks' losses must then be scaled by ``scale_loss``."""
        return values if self.size == 1 else all_reduce_sum(values, self.group)

    def gather(self, shard: Tensor) -> Tensor:
        """The shards of all ranks together, without padding: (B, S, ...) on every rank.

        A loss that every rank computes from it must be scaled by ``scale_loss``.
        """
        if self.size == 1:
            return shard[:, : self.length]
        before = shard.new_zeros(len(shard), self.start, *shard.shape[2:])
        after = self.size * self.tokens - self.start - self.tokens
        rows = torch.cat([before, shard, shard.new_zeros(len(shard), after, *shard.shape[2:])], 1)
        return self.add(rows)[:, : self.length]

    def scale_loss(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What every rank has computed of whole rows, scaled so that the ranks' values add up."""
        return {name: value / self.size for name, value in outputs.items()}

    def inputs(self, whole: Mapping[str, Any]) -> dict[str, Any]:
        """Shard the arguments of a transformers model.

        Args:
            whole: ``input_ids`` or ``inputs_embeds`` (B, S, ...), and where given
                ``attention_mask`` and ``position_ids`` (B, S), ``cu_seq_lens_q`` etc.

        Returns:
            The same of this rank's shard. No ``attention_mask``: the model would take it for one of
            the shard. Attention gets what it needs of whole rows by name: ``sequence_group``, and
            ``sequence_mask`` (B, S padded) or ``cu_seq_lens_q``, in which the padding is a sample
            of its own.
        """
        inputs = dict(whole)
        if self.is_whole:
            return inputs
        mask = inputs.pop("attention_mask", None)
        rows = next(whole[name] for name in BY_TOKEN if name in whole)
        for name in BY_TOKEN:
            if name in inputs:
                inputs[name] = self.shard(inputs[name])
        positions = inputs.get("position_ids")
        if positions is None:
            positions = torch.arange(rows.shape[1], device=rows.device).expand(len(rows), -1)
        inputs["position_ids"] = self.shard(positions)
        inputs["sequence_group"] = self.group
        if "cu_seq_lens_q" in inputs:
            return inputs | self._cu_seqlens(inputs)
        if mask is None and self.padding:
            mask = torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device)
        inputs["sequence_mask"] = None if mask is None else padded(mask, self.padding, 0, 1)
        return inputs

    def _cu_seqlens(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """``cu_seq_lens_q`` etc. with the padding as a sample of its own."""
        if not self.padding:
            return {}
        cu_seqlens = inputs["cu_seq_lens_q"]
        end = self.tokens * self.size
        cu_seqlens = torch.cat([cu_seqlens, cu_seqlens.new_full((1,), end)])
        longest = max(inputs["max_length_q"], self.padding)
        return {
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": longest,
            "max_length_k": longest,
        }
