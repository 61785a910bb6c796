"""Weights that are assembled when they are read, for sharded checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

Make = Callable[[], torch.Tensor]


class LazyWeights(Mapping[str, torch.Tensor]):
    """Weights that are assembled when they are read, one at a time, from mapped files.

    So converting a folder takes memory for one tensor, not for all of them.
    """

    def __init__(self, made: Mapping[str, Make]) -> None:
        self._made = made

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._made[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)
