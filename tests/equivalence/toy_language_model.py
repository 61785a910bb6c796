"""A tiny language model with an adapter on whole or 4-bit weights, trained by the bare engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModel
from torch.utils.data import Dataset

LENGTH = 12


class AdapterModel(BaseModel):
    """A tiny llama with LoRA (dropout in it); its state is the adapter only.

    Args:
        folder: of the base model; made by ``tests.helpers.tiny.save_tiny``.
        quantized: load it in 4 bits with bitsandbytes.
    """

    def __init__(self, folder: str, quantized: bool) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        bits = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)} if quantized else {}
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **bits)
        torch.manual_seed(0)
        lora = LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"])
        self.llm = get_peft_model(base, lora)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        whole = super().state_dict(*args, **kwargs)
        return {name: value for name, value in whole.items() if "lora_" in name}

    def num_items(self, data: Mapping[str, Any]) -> dict[str, int]:
        return {"tokens": data["input_ids"][:, 1:].numel()}

    def forward(
        self,
        data: Mapping[str, Any],
        data_samples: Any = None,
        mode: str = "loss",
        num_items_in_batch: Mapping[str, int] | None = None,
    ) -> dict[str, torch.Tensor]:
        ids = data["input_ids"]
        mean = self.llm(input_ids=ids, labels=ids).loss
        own = self.num_items(data)["tokens"]
        return {"loss": mean * own / (num_items_in_batch or {"tokens": own})["tokens"]}


class TokenRows(Dataset):
    """Rows of random tokens."""

    def __init__(self, count: int = 10) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(10, 500, (count, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": self.ids[row].tolist()}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "data": {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
        "data_samples": None,
    }


def write_config(toy_config: Path, target: Path, base: Path, quantized: bool) -> Path:
    """Write the toy config with this model and data in it."""
    target.write_text(
        toy_config.read_text("utf-8")
        + f"""
from tests.equivalence.toy_language_model import AdapterModel, TokenRows
from tests.equivalence.toy_language_model import collate as collate_tokens

model = dict(type=AdapterModel, folder={str(base)!r}, quantized={quantized})
train_dataloader = dict(
    batch_size=1,
    num_workers=0,
    dataset=dict(type=TokenRows),
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=collate_tokens),
)
val_dataloader = None
val_cfg = None
val_evaluator = None
""",
        encoding="utf-8",
    )
    return target
