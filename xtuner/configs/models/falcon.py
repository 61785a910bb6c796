"""Falcon 3."""

from __future__ import annotations

from xtuner.configs.cards import ModelCard
from xtuner.configs.models.recipes import BASE, CHAT

CARDS = (
    ModelCard(
        name="falcon3_1b_base",
        path="tiiuae/Falcon3-1B-Base",
        billions=1.7,
        recipes=BASE,
    ),
    ModelCard(
        name="falcon3_1b_instruct",
        path="tiiuae/Falcon3-1B-Instruct",
        billions=1.7,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="falcon3_3b_base",
        path="tiiuae/Falcon3-3B-Base",
        billions=3.2,
        recipes=BASE,
    ),
    ModelCard(
        name="falcon3_3b_instruct",
        path="tiiuae/Falcon3-3B-Instruct",
        billions=3.2,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="falcon3_7b_base",
        path="tiiuae/Falcon3-7B-Base",
        billions=7.5,
        recipes=BASE,
    ),
    ModelCard(
        name="falcon3_7b_instruct",
        path="tiiuae/Falcon3-7B-Instruct",
        billions=7.5,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="falcon3_10b_base",
        path="tiiuae/Falcon3-10B-Base",
        billions=10.3,
        recipes=BASE,
    ),
    ModelCard(
        name="falcon3_10b_instruct",
        path="tiiuae/Falcon3-10B-Instruct",
        billions=10.3,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
)
