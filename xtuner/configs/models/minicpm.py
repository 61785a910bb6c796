"""MiniCPM and MiniCPM3."""

from __future__ import annotations

from xtuner.configs.cards import ModelCard
from xtuner.configs.models.recipes import CHAT

PUBLISHED = (
    "dpo_qlora",
    "full_alpaca_zh_e3",
    "full_custom_pretrain_e1",
    "lora_alpaca_zh_e3",
    "qlora_alpaca_enzh_e3",
    "qlora_alpaca_zh_e3",
)

CARDS = (
    ModelCard(
        name="minicpm_1b",
        path="openbmb/MiniCPM-1B-sft-bf16",
        billions=1.4,
        template="minicpm",
        chat=True,
        tokenizer={"eos_token": "</s>"},
        recipes=PUBLISHED,
    ),
    ModelCard(
        name="minicpm_2b",
        path="openbmb/MiniCPM-2B-sft-bf16",
        billions=2.7,
        template="minicpm",
        chat=True,
        tokenizer={"eos_token": "</s>"},
        recipes=PUBLISHED,
    ),
    ModelCard(
        name="minicpm3_4b",
        path="openbmb/MiniCPM3-4B",
        billions=4.1,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
)
