"""What a rank computes of a micro-batch: its stretch of the tokens of each row."""

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
    """A rank's stretch of rows of ``length`` tokens; of all of them where rows are not shared.

    Every rank of the group has the whole micro-batch. Rows are padded at their end to a multiple
    of the ranks; rank r takes the r-th stretch.

    Args:
        length: S.
        group: the ranks that share the rows; those of ``init_sequence_parallel`` by default.
        rounds: make the stretches a number of tokens that others have, too (``pad_to_bucket``); for
            packed rows, in which the padding is a sample of its own.
    """

    def __init__(self, length: int, group: Any = None, rounds: bool = False) -> None:
        self.group = get_sequence_parallel_group() if group is None else group
        self.size = 1 if self.group is None else dist.get_world_size(self.group)
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.length = length
        self.padding = missing(length, self.size)
        if rounds:
            tokens = (length + self.padding) // self.size
            self.padding += (pad_to_bucket(tokens) - tokens) * self.size
        self.is_whole = self.size == 1 and not self.padding
        self.tokens = (length + self.padding) // self.size
        self.start = self.rank * self.tokens

    def cut(self, whole: Tensor, value: Any = 0) -> Tensor:
        """This rank's stretch of (B, S, ...), ``value`` in the padding: (B, S/N, ...)."""
        if self.is_whole:
            return whole
        return padded(whole, self.padding, value, 1)[:, self.start : self.start + self.tokens]

    def add(self, values: Tensor) -> Tensor:
        """Add over the ranks; the ranks' losses must then be ``divided``."""
        return values if self.size == 1 else all_reduce_sum(values, self.group)

    def whole(self, cut: Tensor) -> Tensor:
        """The stretches of all ranks together, without padding: (B, S, ...) on every rank.

        What every rank computes of it must be ``divided``.
        """
        if self.size == 1:
            return cut[:, : self.length]
        before = cut.new_zeros(len(cut), self.start, *cut.shape[2:])
        after = self.size * self.tokens - self.start - self.tokens
        rows = torch.cat([before, cut, cut.new_zeros(len(cut), after, *cut.shape[2:])], dim=1)
        return self.add(rows)[:, : self.length]

    def divided(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What every rank has computed of the whole, as shares that add up over the ranks."""
        return {name: value / self.size for name, value in outputs.items()}

    def inputs(self, whole: Mapping[str, Any]) -> dict[str, Any]:
        """Cut what a transformers model is called with.

        Args:
            whole: ``input_ids`` or ``inputs_embeds`` (B, S, ...), and where given
                ``attention_mask`` and ``position_ids`` (B, S), ``cu_seq_lens_q`` and its kin.

        Returns:
            The same of this rank's stretch. No ``attention_mask``: the model would take it for one
            of the stretch. What attention needs of whole rows goes to it by name:
            ``sequence_group``, and ``sequence_mask`` (B, S padded) or the borders, in which the
            padding is a sample of its own.
        """
        cut = dict(whole)
        if self.is_whole:
            return cut
        mask = cut.pop("attention_mask", None)
        rows = next(whole[name] for name in BY_TOKEN if name in whole)
        for name in BY_TOKEN:
            if name in cut:
                cut[name] = self.cut(cut[name])
        places = cut.get("position_ids")
        if places is None:
            places = torch.arange(rows.shape[1], device=rows.device).expand(len(rows), -1)
        cut["position_ids"] = self.cut(places)
        cut["sequence_group"] = self.group
        if "cu_seq_lens_q" in cut:
            return cut | self._borders(cut)
        if mask is None and self.padding:
            mask = torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device)
        cut["sequence_mask"] = None if mask is None else padded(mask, self.padding, 0, 1)
        return cut

    def _borders(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if not self.padding:
            return {}
        borders = inputs["cu_seq_lens_q"]
        end = self.tokens * self.size
        borders = torch.cat([borders, borders.new_full((1,), end)])
        longest = max(inputs["max_length_q"], self.padding)
        return {
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": longest,
            "max_length_k": longest,
        }
