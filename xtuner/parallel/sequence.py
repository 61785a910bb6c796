"""Sequence parallelism under its published import path: who shares a sample, and its sampler.

Ranks that follow each other form a sequence-parallel group; every rank of a group gets the same
samples. Splitting a sample over the ranks of a group is not built yet: training refuses a
``sequence_parallel_size`` above 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized

import torch
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Sampler

_size = 1


def init_sequence_parallel(sequence_parallel_size: int = 1) -> None:
    """Say how many ranks share a sample.

    Args:
        sequence_parallel_size: ranks of a group; it must divide the number of processes.

    Raises:
        ValueError: when it does not.
    """
    global _size
    _, world_size = get_dist_info()
    if sequence_parallel_size < 1 or world_size % sequence_parallel_size:
        raise ValueError(
            f"sequence_parallel_size={sequence_parallel_size} does not divide the number of "
            f"processes, {world_size}"
        )
    _size = sequence_parallel_size


def get_sequence_parallel_world_size() -> int:
    """Ranks that share a sample."""
    return _size


def get_sequence_parallel_rank() -> int:
    """This process's place among the ranks that share its sample."""
    return get_dist_info()[0] % _size


def get_data_parallel_world_size() -> int:
    """Groups of ranks that read samples of their own."""
    return get_dist_info()[1] // _size


def get_data_parallel_rank() -> int:
    """The number of this process's group."""
    return get_dist_info()[0] // _size


class SequenceParallelSampler(Sampler[int]):
    """mmengine's ``DefaultSampler``, by groups of ranks instead of ranks.

    Args:
        dataset: what is sampled.
        shuffle: by epoch.
        seed: of the order; the same on all ranks. One is agreed upon when None.
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
        """Take the order of an epoch."""
        self.epoch = epoch
