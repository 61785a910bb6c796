"""Gemma, Gemma 2 and the text models of Gemma 3."""

from __future__ import annotations

from xtuner.configs.cards import ModelCard
from xtuner.configs.models.recipes import (
    BASE,
    CHAT,
    CUSTOM_SFT,
    FULL_AND_QLORA,
    LARGE_BASE,
    LARGE_CHAT,
    PRETRAIN,
)

CARDS = (
    ModelCard(
        name="gemma_2b",
        path="google/gemma-2b",
        billions=2.5,
        recipes=(*FULL_AND_QLORA, *CUSTOM_SFT, *PRETRAIN),
    ),
    ModelCard(
        name="gemma_2b_it",
        path="google/gemma-2b-it",
        billions=2.5,
        template="gemma",
        chat=True,
        recipes=(*FULL_AND_QLORA, *CUSTOM_SFT),
    ),
    ModelCard(
        name="gemma_7b",
        path="google/gemma-7b",
        billions=8.5,
        recipes=(*FULL_AND_QLORA, *CUSTOM_SFT, *PRETRAIN),
    ),
    ModelCard(
        name="gemma_7b_it",
        path="google/gemma-7b-it",
        billions=8.5,
        template="gemma",
        chat=True,
        recipes=(*FULL_AND_QLORA, *CUSTOM_SFT),
    ),
    ModelCard(
        name="gemma2_2b",
        path="google/gemma-2-2b",
        billions=2.6,
        recipes=BASE,
    ),
    ModelCard(
        name="gemma2_2b_it",
        path="google/gemma-2-2b-it",
        billions=2.6,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="gemma2_9b",
        path="google/gemma-2-9b",
        billions=9.2,
        recipes=BASE,
    ),
    ModelCard(
        name="gemma2_9b_it",
        path="google/gemma-2-9b-it",
        billions=9.2,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="gemma2_27b",
        path="google/gemma-2-27b",
        billions=27.2,
        recipes=LARGE_BASE,
    ),
    ModelCard(
        name="gemma2_27b_it",
        path="google/gemma-2-27b-it",
        billions=27.2,
        template="auto",
        chat=True,
        recipes=LARGE_CHAT,
    ),
    ModelCard(
        name="gemma3_270m",
        path="google/gemma-3-270m",
        billions=0.3,
        recipes=BASE,
    ),
    ModelCard(
        name="gemma3_270m_it",
        path="google/gemma-3-270m-it",
        billions=0.3,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="gemma3_1b",
        path="google/gemma-3-1b-pt",
        billions=1.0,
        recipes=BASE,
    ),
    ModelCard(
        name="gemma3_1b_it",
        path="google/gemma-3-1b-it",
        billions=1.0,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
)
