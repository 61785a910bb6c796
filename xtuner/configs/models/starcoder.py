"""StarCoder and StarCoder2."""

from __future__ import annotations

from xtuner.configs.cards import ModelCard
from xtuner.configs.models.recipes import (
    CUSTOM_SFT,
    PRETRAIN,
)

CODE = ("full_code_alpaca_e3", "lora_code_alpaca_e3", "qlora_code_alpaca_e3")

CARDS = (
    ModelCard(
        name="starcoder",
        path="bigcode/starcoder",
        billions=15.5,
        settings={
            "lora_targets": ["c_proj", "c_attn", "q_attn"],
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
        },
        recipes=(*PRETRAIN, *CUSTOM_SFT, "qlora_stack_exchange_example"),
    ),
    ModelCard(
        name="starcoder2_3b",
        path="bigcode/starcoder2-3b",
        billions=3.0,
        recipes=CODE,
    ),
    ModelCard(
        name="starcoder2_7b",
        path="bigcode/starcoder2-7b",
        billions=7.2,
        recipes=CODE,
    ),
    ModelCard(
        name="starcoder2_15b",
        path="bigcode/starcoder2-15b",
        billions=16.0,
        recipes=CODE,
    ),
    ModelCard(
        name="starcoder2_15b_instruct",
        path="bigcode/starcoder2-15b-instruct-v0.1",
        billions=16.0,
        template="auto",
        chat=True,
        recipes=(*CODE, *CUSTOM_SFT),
    ),
)
