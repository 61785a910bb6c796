"""Rows and pairs of random tokens; how long they are, and what of them is trained, differs."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

IGNORED = -100


class Rows(Dataset):
    """Rows of 9 to 31 tokens whose last few are trained: often those of one rank's shard."""

    def __init__(self, count: int = 44, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(9, 32, (count,), generator=generator).tolist()
        self.ids = [
            torch.randint(10, 500, (n,), generator=generator).tolist() for n in self.lengths
        ]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return _labelled(self.ids[row], 1 + row % 8)


class Pairs(Rows):
    """Two rows each; the reward's labels, if asked for, are at their last tokens."""

    def __init__(self, count: int = 44, reward: bool = False, seed: int = 0) -> None:
        super().__init__(2 * count, seed)
        self.reward = reward

    def __len__(self) -> int:
        return len(self.ids) // 2

    def __getitem__(self, row: int) -> dict[str, Any]:
        pair = {}
        for number, side in enumerate(("chosen", "rejected")):
            ids = self.ids[2 * row + number]
            labels = _labelled(ids, 2 + row % 7)["labels"]
            if self.reward:
                labels = [IGNORED] * (len(ids) - 1) + [number]
            pair |= {f"{side}_ids": ids, f"{side}_labels": labels}
        return {**pair, "rows": [row]}


def _labelled(ids: list[int], trained: int) -> dict[str, Any]:
    return {"input_ids": ids, "labels": [IGNORED] * (len(ids) - trained) + ids[-trained:]}
