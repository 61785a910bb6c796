"""Batches of rows of similar length, which need little padding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mmengine.dist import sync_random_seed
from torch.utils.data import Sampler

from xtuner.parallel.sequence.groups import get_data_parallel_rank, get_data_parallel_world_size


class LengthGroupedSampler(Sampler[int]):
    """Shuffles, then sorts by length within mega-batches.

    Args:
        dataset: has ``length_property`` as a column or an attribute.
        per_device_batch_size: rows of a batch of one process (with accumulation, of a step).
        length_property: tokens of each row; negative ones are another modality, and a batch never
            mixes the two.
        mega_batch_mult: batches of all processes that are sorted together; chosen when None.
        seed: of the order, the same on all ranks; a run passes its own. None: rank 0 draws one.
        round_up: repeat rows so that every process gets the same number.
    """

    def __init__(
        self,
        dataset: Any,
        per_device_batch_size: int,
        length_property: str = "length",
        mega_batch_mult: int | None = None,
        seed: int | None = None,
        round_up: bool = True,
    ) -> None:
        # Processes that share rows count as one here.
        self.rank, self.world_size = get_data_parallel_rank(), get_data_parallel_world_size()
        columns = getattr(dataset, "column_names", ())
        found = (
            dataset[length_property]
            if length_property in columns
            else getattr(dataset, length_property)
        )
        self.lengths = [int(length) for length in found]
        self.seed = sync_random_seed() if seed is None else seed
        self.epoch = 0
        self.total_batch_size = per_device_batch_size * self.world_size
        batches = max(1, len(self.lengths) // (self.total_batch_size * 4))
        self.mega_batch_mult = mega_batch_mult or min(50, batches)
        share = len(self.lengths) / self.world_size
        self.num_samples = math.ceil(share) if round_up else math.floor(share)
        if not round_up and self.rank < len(self.lengths) % self.world_size:
            self.num_samples += 1
        self.total_size = self.num_samples * self.world_size if round_up else len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = self._order(generator)
        while len(order) < self.total_size:
            order += order[: self.total_size - len(order)]
        return iter(order[self.rank : self.total_size : self.world_size])

    def __len__(self) -> int:
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch."""
        self.epoch = epoch

    def _order(self, generator: torch.Generator) -> list[int]:
        modalities = [
            [i for i, length in enumerate(self.lengths) if length > 0],
            [i for i, length in enumerate(self.lengths) if length <= 0],
        ]
        batches, rest = [], []
        for rows in modalities:
            grouped = self._grouped(rows, generator)
            size = self.total_batch_size
            parts = [grouped[i : i + size] for i in range(0, len(grouped), size)]
            batches += [part for part in parts if len(part) == size]
            rest += [row for part in parts if len(part) < size for row in part]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        # Incomplete batches come last: only there may a batch mix modalities.
        return [row for number in shuffled for row in batches[number]] + rest

    def _grouped(self, rows: Sequence[int], generator: torch.Generator) -> list[int]:
        shuffled = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        size = self.mega_batch_mult * self.total_batch_size
        groups = [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
        return [
            row
            for group in groups
            for row in sorted(group, key=lambda i: abs(self.lengths[i]), reverse=True)
        ]
