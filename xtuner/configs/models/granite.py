"""Granite 3.3 and Granite 4."""

from __future__ import annotations

from xtuner.configs.cards import ModelCard
from xtuner.configs.models.recipes import BASE, CHAT

CARDS = (
    ModelCard(
        name="granite3_3_2b_base",
        path="ibm-granite/granite-3.3-2b-base",
        billions=2.5,
        recipes=BASE,
    ),
    ModelCard(
        name="granite3_3_2b_instruct",
        path="ibm-granite/granite-3.3-2b-instruct",
        billions=2.5,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="granite3_3_8b_base",
        path="ibm-granite/granite-3.3-8b-base",
        billions=8.2,
        recipes=BASE,
    ),
    ModelCard(
        name="granite3_3_8b_instruct",
        path="ibm-granite/granite-3.3-8b-instruct",
        billions=8.2,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="granite4_micro",
        path="ibm-granite/granite-4.0-micro",
        billions=3.4,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="granite4_h_micro",
        path="ibm-granite/granite-4.0-h-micro",
        billions=3.2,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="granite4_h_tiny",
        path="ibm-granite/granite-4.0-h-tiny",
        billions=6.9,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
)
