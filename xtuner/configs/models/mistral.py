"""Mistral, Mixtral, Mistral Nemo, Mistral Small and Zephyr."""

from __future__ import annotations

from xtuner.configs.cards import ModelCard
from xtuner.configs.models.recipes import (
    BASE,
    CHAT,
    CHAT_PREFERENCE,
    CUSTOM_SFT,
    LARGE_BASE,
    LARGE_CHAT,
    PRETRAIN,
    VISION,
)

# peft has no dropout for experts, which transformers keeps in one tensor.
MIXTRAL_LORA = {
    "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"],
    "lora_dropout": 0.0,
}

CARDS = (
    ModelCard(
        name="mistral_7b",
        path="mistralai/Mistral-7B-v0.1",
        billions=7.2,
        recipes=(
            *PRETRAIN,
            "full_finetune_custom_dataset_e1",
            "full_finetune_custom_sft_e1",
            "qlora_skypile_pretrain_e1",
            "w_tokenized_dataset",
            "w_untokenized_dataset",
        ),
    ),
    ModelCard(
        name="mistral_7b_v0_3",
        path="mistralai/Mistral-7B-v0.3",
        billions=7.2,
        recipes=BASE,
    ),
    ModelCard(
        name="mistral_7b_instruct_v0_3",
        path="mistralai/Mistral-7B-Instruct-v0.3",
        billions=7.2,
        template="auto",
        chat=True,
        recipes=CHAT_PREFERENCE,
    ),
    ModelCard(
        name="mistral_nemo_base",
        path="mistralai/Mistral-Nemo-Base-2407",
        billions=12.2,
        recipes=BASE,
    ),
    ModelCard(
        name="mistral_nemo_instruct",
        path="mistralai/Mistral-Nemo-Instruct-2407",
        billions=12.2,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="mixtral_8x7b",
        path="mistralai/Mixtral-8x7B-v0.1",
        billions=46.7,
        template="mixtral",
        settings=MIXTRAL_LORA,
        recipes=(*PRETRAIN, "full_oasst1_e3", "qlora_oasst1_e3"),
    ),
    ModelCard(
        name="mixtral_8x7b_instruct",
        path="mistralai/Mixtral-8x7B-Instruct-v0.1",
        billions=46.7,
        template="mixtral",
        chat=True,
        settings=MIXTRAL_LORA,
        recipes=(*CUSTOM_SFT, "full_oasst1_e3", "qlora_oasst1_e3"),
    ),
    ModelCard(
        name="zephyr_7b_beta",
        path="HuggingFaceH4/zephyr-7b-beta",
        billions=7.2,
        template="zephyr",
        chat=True,
        recipes=(*CUSTOM_SFT, "qlora_alpaca_e3", *PRETRAIN),
    ),
    ModelCard(
        name="mistral_small_24b_base",
        path="mistralai/Mistral-Small-24B-Base-2501",
        billions=23.6,
        recipes=LARGE_BASE,
    ),
    ModelCard(
        name="mistral_small_24b_instruct",
        path="mistralai/Mistral-Small-24B-Instruct-2501",
        billions=23.6,
        template="auto",
        chat=True,
        recipes=LARGE_CHAT,
    ),
    ModelCard(
        name="ministral3_3b_base",
        path="mistralai/Ministral-3-3B-Base-2512",
        billions=3.8,
        recipes=BASE,
    ),
    ModelCard(
        name="ministral3_3b_instruct",
        path="mistralai/Ministral-3-3B-Instruct-2512-BF16",  # without the suffix it is FP8
        billions=3.8,
        kind="vision",
        template="auto",
        chat=True,
        recipes=(*CHAT, *VISION),
    ),
    ModelCard(
        name="ministral3_8b_base",
        path="mistralai/Ministral-3-8B-Base-2512",
        billions=8.8,
        recipes=BASE,
    ),
    ModelCard(
        name="ministral3_8b_instruct",
        path="mistralai/Ministral-3-8B-Instruct-2512-BF16",  # without the suffix it is FP8
        billions=8.8,
        kind="vision",
        template="auto",
        chat=True,
        recipes=(*CHAT, *VISION),
    ),
    ModelCard(
        name="ministral3_14b_base",
        path="mistralai/Ministral-3-14B-Base-2512",
        billions=13.9,
        recipes=BASE,
    ),
    ModelCard(
        name="ministral3_14b_instruct",
        path="mistralai/Ministral-3-14B-Instruct-2512-BF16",  # without the suffix it is FP8
        billions=13.9,
        kind="vision",
        template="auto",
        chat=True,
        recipes=(*CHAT, *VISION),
    ),
)
