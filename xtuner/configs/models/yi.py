"""Yi and Yi-1.5."""

from __future__ import annotations

from xtuner.configs.cards import ModelCard
from xtuner.configs.models.recipes import (
    BASE,
    CHAT,
    CUSTOM_SFT,
    LARGE_BASE,
    LARGE_CHAT,
    PRETRAIN,
)

CARDS = (
    ModelCard(
        name="yi_6b",
        path="01-ai/Yi-6B",
        billions=6.1,
        recipes=(*PRETRAIN, *CUSTOM_SFT, "qlora_alpaca_enzh_e3"),
    ),
    ModelCard(
        name="yi_34b",
        path="01-ai/Yi-34B",
        billions=34.4,
        recipes=(*PRETRAIN, *CUSTOM_SFT, "qlora_alpaca_enzh_e3"),
    ),
    ModelCard(
        name="yi_34b_200k",
        path="01-ai/Yi-34B-200K",
        billions=34.4,
        template="llama2_chat",
        recipes=(
            "full_alpaca_enzh_8k_sp1",
            "full_alpaca_enzh_32k_sp2",
            "full_alpaca_enzh_128k_sp8",
            "full_alpaca_enzh_256k_sp8",
        ),
    ),
    ModelCard(
        name="yi1_5_6b",
        path="01-ai/Yi-1.5-6B",
        billions=6.1,
        recipes=BASE,
    ),
    ModelCard(
        name="yi1_5_6b_chat",
        path="01-ai/Yi-1.5-6B-Chat",
        billions=6.1,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="yi1_5_9b",
        path="01-ai/Yi-1.5-9B",
        billions=8.8,
        recipes=BASE,
    ),
    ModelCard(
        name="yi1_5_9b_chat",
        path="01-ai/Yi-1.5-9B-Chat",
        billions=8.8,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="yi1_5_34b",
        path="01-ai/Yi-1.5-34B",
        billions=34.4,
        recipes=LARGE_BASE,
    ),
    ModelCard(
        name="yi1_5_34b_chat",
        path="01-ai/Yi-1.5-34B-Chat",
        billions=34.4,
        template="auto",
        chat=True,
        recipes=LARGE_CHAT,
    ),
)
