"""Phi-3, Phi-3.5, Phi-4 and Phi-4-reasoning."""

from __future__ import annotations

from xtuner.configs.cards import Code, ModelCard
from xtuner.configs.models.recipes import (
    CHAT,
    CHAT_PREFERENCE,
    FULL_AND_QLORA,
)

CARDS = (
    ModelCard(
        name="phi3_mini_4k_instruct",
        path="microsoft/Phi-3-mini-4k-instruct",
        billions=3.8,
        template="phi3_chat",
        chat=True,
        settings={"max_length": 4096},
        recipes=FULL_AND_QLORA,
    ),
    ModelCard(
        name="phi3_mini_128k_instruct",
        path="microsoft/Phi-3-mini-128k-instruct",
        billions=3.8,
        template="phi3_chat",
        chat=True,
        settings={"max_length": Code("128 * 1024")},
        recipes=FULL_AND_QLORA,
    ),
    ModelCard(
        name="phi3_medium_4k_instruct",
        path="microsoft/Phi-3-medium-4k-instruct",
        billions=14.0,
        template="phi3_chat",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="phi3_5_mini_instruct",
        path="microsoft/Phi-3.5-mini-instruct",
        billions=3.8,
        template="auto",
        chat=True,
        recipes=CHAT_PREFERENCE,
    ),
    ModelCard(
        name="phi4_mini_instruct",
        path="microsoft/Phi-4-mini-instruct",
        billions=3.8,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="phi4",
        path="microsoft/phi-4",
        billions=14.7,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="phi4_reasoning",
        path="microsoft/Phi-4-reasoning",
        billions=14.7,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
)
