"""Baichuan and Baichuan2."""

from __future__ import annotations

from xtuner.configs.cards import ModelCard
from xtuner.configs.models.recipes import (
    ALPACAS,
    CLASSIC,
    CUSTOM_SFT,
    MOSS,
    OASST1,
    PLATYPUS,
    PRETRAIN,
    TASKS,
    qlora,
)

CARDS = (
    ModelCard(
        name="baichuan_7b",
        path="baichuan-inc/Baichuan-7B",
        billions=7.0,
        settings={"bot_name": "Baichuan"},
        recipes=(*CLASSIC, *MOSS, *CUSTOM_SFT),
    ),
    ModelCard(
        name="baichuan_13b_base",
        path="baichuan-inc/Baichuan-13B-Base",
        billions=13.3,
        settings={"bot_name": "Baichuan"},
        recipes=(*CLASSIC, *MOSS),
    ),
    ModelCard(
        name="baichuan_13b_chat",
        path="baichuan-inc/Baichuan-13B-Chat",
        billions=13.3,
        template="baichuan_chat",
        chat=True,
        recipes=(*CLASSIC, *CUSTOM_SFT),
    ),
    ModelCard(
        name="baichuan2_7b_base",
        path="baichuan-inc/Baichuan2-7B-Base",
        billions=7.5,
        recipes=(*ALPACAS, *OASST1, *TASKS, *PLATYPUS, *PRETRAIN),
    ),
    ModelCard(
        name="baichuan2_7b_chat",
        path="baichuan-inc/Baichuan2-7B-Chat",
        billions=7.5,
        template="baichuan2_chat",
        chat=True,
        recipes=(*ALPACAS, *OASST1, *PLATYPUS, *CUSTOM_SFT, *qlora("code_alpaca_e3", "lawyer_e3")),
    ),
    ModelCard(
        name="baichuan2_13b_base",
        path="baichuan-inc/Baichuan2-13B-Base",
        billions=13.9,
        recipes=(*ALPACAS, *OASST1, *TASKS, *PLATYPUS, *PRETRAIN),
    ),
    ModelCard(
        name="baichuan2_13b_chat",
        path="baichuan-inc/Baichuan2-13B-Chat",
        billions=13.9,
        template="baichuan2_chat",
        chat=True,
        recipes=(*ALPACAS, *OASST1, *PLATYPUS, *CUSTOM_SFT, *qlora("code_alpaca_e3", "lawyer_e3")),
    ),
)
