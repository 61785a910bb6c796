"""Rows of random tokens, each with another number of trained ones."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

LENGTH = 16


class LabelledRows(Dataset):
    """Rows of which the first 1 to 12 tokens are not trained, so that weights by tokens matter."""

    def __init__(self, count: int = 48) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(10, 500, (count, LENGTH), generator=generator)
        self.masked = torch.randint(1, 13, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Any]:
        ids = self.ids[row].tolist()
        masked = int(self.masked[row])
        return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}
