"""Where in the data a run is, and resuming from there without loading what came before."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler


def from_batch(dataloader: DataLoader, skip: int) -> Iterator[Any]:
    """Iterate over an epoch of ``dataloader`` from its batch number ``skip`` on.

    The first ``skip`` batches are drawn from the sampler but not loaded. The loader draws no number
    from torch's global random state (it would at the start of each epoch), so that a run which
    starts in the middle of an epoch has the same dropout as one that has come there by itself.

    Args:
        dataloader: a loader over a dataset with a sampler; its sampler's ``set_epoch`` was called.
        skip: number of batches to leave out, from 0 to ``len(dataloader)``.
    """
    if dataloader.generator is None:
        dataloader.generator = torch.Generator().manual_seed(0)
    if skip == 0:
        return iter(dataloader)
    batches: Any = dataloader.batch_sampler
    if not hasattr(batches, "sampler"):  # a batch sampler of the user's own
        return itertools.islice(iter(dataloader), skip, None)
    whole = batches.sampler
    batches.sampler = _Rest(whole, skip * batches.batch_size)
    return _restoring(iter(dataloader), batches, whole)


def _restoring(batches: Iterator[Any], batch_sampler: Any, whole: Any) -> Iterator[Any]:
    """Pass the batches on; the sampler is whole again when the epoch is over."""
    try:
        yield from batches
    finally:
        batch_sampler.sampler = whole


class _Rest(Sampler):
    """A sampler without its first ``skip`` rows."""

    def __init__(self, sampler: Sampler, skip: int) -> None:
        self.sampler = sampler
        self.skip = skip

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.sampler), self.skip, None)

    def __len__(self) -> int:
        """The length of the whole: how long an epoch is does not change by resuming."""
        return len(self.sampler)  # type: ignore[arg-type]
