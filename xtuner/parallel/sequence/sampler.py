"""A sampler by sequence-parallel groups: every rank of a group gets the same rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized

import torch
from mmengine.dist import sync_random_seed
from torch.utils.data import Sampler

from xtuner.parallel.sequence.groups import get_data_parallel_rank, get_data_parallel_world_size


class SequenceParallelSampler(Sampler[int]):
    """mmengine's ``DefaultSampler`` with groups in the place of ranks.

    Args:
        dataset: what is sampled.
        shuffle: draw another order each epoch.
        seed: of the order, the same on all ranks; when None, rank 0 draws one for all.
        round_up: repeat rows so that every group gets the same number.
    """

    def __init__(
        self,
        dataset: Sized,
        shuffle: bool = True,
        seed: int | None = None,
        round_up: bool = True,
    ) -> None:
        self.rank = get_data_parallel_rank()
        self.world_size = get_data_parallel_world_size()
        self.rows = len(dataset)
        self.shuffle = shuffle
        self.seed = sync_random_seed() if seed is None else seed
        self.epoch = 0
        self.total_size = self.rows
        if round_up:
            self.total_size = math.ceil(self.rows / self.world_size) * self.world_size

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.rows))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.rows, generator=generator).tolist()
        while len(order) < self.total_size:
            order += order[: self.total_size - len(order)]
        return iter(order[self.rank : self.total_size : self.world_size])

    def __len__(self) -> int:
        return len(range(self.rank, self.total_size, self.world_size))

    def set_epoch(self, epoch: int) -> None:
        """Select the order of an epoch, counted from 0."""
        self.epoch = epoch
