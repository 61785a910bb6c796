"""The models: one card each, a family a file; families of few cards share ``others``.

To add a model, add its card to its family's file.

``xtuner list-cfg`` shows a card's recipes; the other methods and datasets that fit it have names
too.
"""

from __future__ import annotations

from xtuner.configs.cards import ModelCard
from xtuner.configs.models import (
    baichuan,
    cohere,
    deepseek,
    falcon,
    gemma,
    glm,
    granite,
    internlm,
    llama,
    minicpm,
    mistral,
    olmo,
    others,
    phi,
    qwen,
    smollm,
    starcoder,
    vision,
    yi,
)

FAMILIES = (
    internlm,
    llama,
    qwen,
    deepseek,
    glm,
    gemma,
    mistral,
    phi,
    baichuan,
    yi,
    minicpm,
    starcoder,
    cohere,
    smollm,
    olmo,
    granite,
    falcon,
    vision,
    others,
)
MODELS: dict[str, ModelCard] = {card.name: card for family in FAMILIES for card in family.CARDS}
