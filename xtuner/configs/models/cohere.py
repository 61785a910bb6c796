"""Command R."""

from __future__ import annotations

from xtuner.configs.cards import ModelCard
from xtuner.configs.models.recipes import CHAT, LARGE_CHAT

CARDS = (
    ModelCard(
        name="command_r_35b",
        path="CohereLabs/c4ai-command-r-v01",
        billions=35.0,
        template="cohere_chat",
        chat=True,
        recipes=LARGE_CHAT,
    ),
    ModelCard(
        name="command_r7b",
        path="CohereLabs/c4ai-command-r7b-12-2024",
        billions=8.0,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
)
