"""SmolLM2 and SmolLM3."""

from __future__ import annotations

from xtuner.configs.cards import ModelCard
from xtuner.configs.models.recipes import BASE, CHAT

CARDS = (
    ModelCard(
        name="smollm2_135m",
        path="HuggingFaceTB/SmolLM2-135M",
        billions=0.1,
        recipes=BASE,
    ),
    ModelCard(
        name="smollm2_135m_instruct",
        path="HuggingFaceTB/SmolLM2-135M-Instruct",
        billions=0.1,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="smollm2_360m",
        path="HuggingFaceTB/SmolLM2-360M",
        billions=0.4,
        recipes=BASE,
    ),
    ModelCard(
        name="smollm2_360m_instruct",
        path="HuggingFaceTB/SmolLM2-360M-Instruct",
        billions=0.4,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="smollm2_1_7b",
        path="HuggingFaceTB/SmolLM2-1.7B",
        billions=1.7,
        recipes=BASE,
    ),
    ModelCard(
        name="smollm2_1_7b_instruct",
        path="HuggingFaceTB/SmolLM2-1.7B-Instruct",
        billions=1.7,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="smollm3_3b_base",
        path="HuggingFaceTB/SmolLM3-3B-Base",
        billions=3.1,
        recipes=BASE,
    ),
    ModelCard(
        name="smollm3_3b",
        path="HuggingFaceTB/SmolLM3-3B",
        billions=3.1,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
)
