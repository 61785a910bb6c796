"""OLMo 2 and OLMo 3."""

from __future__ import annotations

from xtuner.configs.cards import ModelCard
from xtuner.configs.models.recipes import BASE, CHAT, LARGE_BASE, LARGE_CHAT

CARDS = (
    ModelCard(
        name="olmo2_1b",
        path="allenai/OLMo-2-0425-1B",
        billions=1.5,
        recipes=BASE,
    ),
    ModelCard(
        name="olmo2_1b_instruct",
        path="allenai/OLMo-2-0425-1B-Instruct",
        billions=1.5,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="olmo2_7b",
        path="allenai/OLMo-2-1124-7B",
        billions=7.3,
        recipes=BASE,
    ),
    ModelCard(
        name="olmo2_7b_instruct",
        path="allenai/OLMo-2-1124-7B-Instruct",
        billions=7.3,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="olmo2_13b",
        path="allenai/OLMo-2-1124-13B",
        billions=13.7,
        recipes=BASE,
    ),
    ModelCard(
        name="olmo2_13b_instruct",
        path="allenai/OLMo-2-1124-13B-Instruct",
        billions=13.7,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="olmo2_32b",
        path="allenai/OLMo-2-0325-32B",
        billions=32.2,
        recipes=LARGE_BASE,
    ),
    ModelCard(
        name="olmo2_32b_instruct",
        path="allenai/OLMo-2-0325-32B-Instruct",
        billions=32.2,
        template="auto",
        chat=True,
        recipes=LARGE_CHAT,
    ),
    ModelCard(
        name="olmo3_7b_instruct",
        path="allenai/Olmo-3-7B-Instruct",
        billions=7.3,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="olmo3_32b_think",
        path="allenai/Olmo-3-32B-Think",
        billions=32.2,
        template="auto",
        chat=True,
        recipes=LARGE_CHAT,
    ),
)
