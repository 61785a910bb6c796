"""The order of InternLM's training code: the usual one, from a fixed seed."""

from __future__ import annotations

import warnings
from collections.abc import Sized

from xtuner.parallel.sequence import SequenceParallelSampler

SEED = 1024


class InternRepoSampler(SequenceParallelSampler):
    """The order of mmengine's ``DefaultSampler``, by groups of ranks, from seed 1024 unless given.

    Args:
        dataset: what is sampled.
        shuffle: by epoch.
        seed: of the order.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int | None = None) -> None:
        super().__init__(dataset, shuffle=shuffle, seed=SEED if seed is None else seed)


class InternlmRepoSampler(InternRepoSampler):
    """The former name of ``InternRepoSampler``."""

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int | None = None) -> None:
        warnings.warn("InternlmRepoSampler is now InternRepoSampler", FutureWarning, stacklevel=2)
        super().__init__(dataset, shuffle, seed)
