"""ChatGLM2, ChatGLM3, GLM-4, GLM-4.5 and GLM-4.7."""

from __future__ import annotations

from xtuner.configs.cards import ModelCard
from xtuner.configs.models.recipes import (
    BASE,
    CHAT,
    CLASSIC,
    CUSTOM_SFT,
    LARGE_BASE,
    LARGE_CHAT,
    PRETRAIN,
)

CARDS = (
    ModelCard(
        name="chatglm2_6b",
        path="THUDM/chatglm2-6b",
        billions=6.2,
        template="chatglm2",
        chat=True,
        settings={"padding_side": "left"},
        recipes=(*CLASSIC, *CUSTOM_SFT, *PRETRAIN),
    ),
    ModelCard(
        name="chatglm3_6b",
        path="THUDM/chatglm3-6b",
        billions=6.2,
        template="chatglm3",
        chat=True,
        tokenizer={"encode_special_tokens": True},
        settings={"padding_side": "left"},
        recipes=(*CLASSIC, *CUSTOM_SFT, *PRETRAIN),
    ),
    ModelCard(
        name="chatglm3_6b_base",
        path="THUDM/chatglm3-6b-base",
        billions=6.2,
        template="chatglm3",
        tokenizer={"encode_special_tokens": True},
        settings={"padding_side": "left"},
        recipes=CLASSIC,
    ),
    ModelCard(
        name="glm4_9b",
        path="zai-org/glm-4-9b-hf",
        billions=9.4,
        recipes=BASE,
    ),
    ModelCard(
        name="glm4_9b_chat",
        path="zai-org/glm-4-9b-chat-hf",
        billions=9.4,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="glm4_9b_0414",
        path="zai-org/GLM-4-9B-0414",
        billions=9.4,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="glm4_32b_0414",
        path="zai-org/GLM-4-32B-0414",
        billions=32.6,
        template="auto",
        chat=True,
        recipes=LARGE_CHAT,
    ),
    ModelCard(
        name="glm4_32b_base_0414",
        path="zai-org/GLM-4-32B-Base-0414",
        billions=32.6,
        recipes=LARGE_BASE,
    ),
    ModelCard(
        name="glm4_5_air",
        path="zai-org/GLM-4.5-Air",
        billions=106.0,
        template="auto",
        chat=True,
        recipes=LARGE_CHAT,
    ),
    ModelCard(
        name="glm4_5_air_base",
        path="zai-org/GLM-4.5-Air-Base",
        billions=106.0,
        recipes=LARGE_BASE,
    ),
    ModelCard(
        name="glm4_7_flash",
        path="zai-org/GLM-4.7-Flash",
        billions=30.0,
        template="auto",
        chat=True,
        recipes=LARGE_CHAT,
    ),
)
