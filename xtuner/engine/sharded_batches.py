"""The batches of a dataset in order, distributed over the ranks, as many to each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from mmengine.dist import all_gather_object
from torch.utils.data import DataLoader

from xtuner.parallel.sequence.groups import (
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_sequence_parallel_world_size,
)

T = TypeVar("T")


class SizedRows(Protocol):
    """A dataset with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Any: ...


class ShardedBatches:
    """Iterates over this rank's batches; each comes with whether it counts.

    Batch n goes to data-parallel rank n mod N, so results do not depend on the number of ranks;
    ranks of one sequence-parallel group get the same batches. A rank without a batch of its own in
    the last round gets the dataset's first one, which does not count.

    Args:
        dataset: the rows.
        like: a loader with the collate function, the number of workers and the batch size.
        batch_size: rows of a batch; that of ``like`` when None.
    """

    def __init__(
        self, dataset: SizedRows, like: DataLoader[Any], batch_size: int | None = None
    ) -> None:
        size = batch_size or like.batch_size or 1
        starts = range(0, len(dataset), size)
        batches = [list(range(start, min(start + size, len(dataset)))) for start in starts]
        ranks = get_data_parallel_world_size()
        rounds = math.ceil(len(batches) / ranks)
        own = [get_data_parallel_rank() + turn * ranks for turn in range(rounds)]
        self.count = len(batches)
        self._counts = [number < len(batches) for number in own]
        self._loader: DataLoader[Any] = DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_sampler=[batches[number if number < len(batches) else 0] for number in own],
            collate_fn=like.collate_fn,
            num_workers=like.num_workers,
            generator=torch.Generator(),  # the global random state is left alone
        )

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        return zip(self._loader, self._counts, strict=True)

    def __len__(self) -> int:
        return len(self._counts)

    def gather(self, results: Sequence[T]) -> list[T]:
        """The results of all batches of the dataset, in order, on every rank.

        Args:
            results: of this rank's batches that count.
        """
        by_rank = all_gather_object(list(results))
        groups = by_rank[:: get_sequence_parallel_world_size()]
        return [groups[number % len(groups)][number // len(groups)] for number in range(self.count)]
