"""A model and data of a few numbers that keep the contracts of ours: the engine is tested alone.

The model has dropout, so that a random state which is not put back shows in the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

WIDTH = 8


class ToyModel(BaseModel):
    """A two-layer net with dropout; its loss is a mean over the rows of a step."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(width, 16), nn.Dropout(0.3), nn.Linear(16, 1))

    def num_items(self, data: Mapping[str, Any]) -> dict[str, int]:
        return {"rows": len(data["x"])}

    def forward(
        self,
        data: Mapping[str, Any],
        data_samples: Any = None,
        mode: str = "loss",
        num_items_in_batch: Mapping[str, int] | None = None,
    ) -> dict[str, torch.Tensor]:
        count = (num_items_in_batch or self.num_items(data))["rows"]
        error = functional.mse_loss(self.layers(data["x"])[:, 0], data["y"], reduction="sum")
        return {"loss": error / count}

    def to_hf(self, save_dir: str) -> None:
        """Write what stands for the Hugging Face folder of this model."""
        Path(save_dir).mkdir(parents=True)
        (Path(save_dir) / "config.json").write_text("{}")
        torch.save(self.state_dict(), Path(save_dir) / "model.bin")


class ToyRows(Dataset):
    """Rows of random numbers, the same for the same seed."""

    def __init__(self, count: int = 22, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, WIDTH, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": [row], "x": self.x[row], "y": self.x[row].sum().tanh()}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack rows into a batch of the published form."""
    data = {name: torch.stack([row[name] for row in rows]) for name in ("x", "y")}
    return {"data": data, "data_samples": None}
