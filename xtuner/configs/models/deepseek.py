"""DeepSeek: Coder, MoE, V2, V3 and the distilled R1 models."""

from __future__ import annotations

from xtuner.configs.cards import N_, ModelCard
from xtuner.configs.models.recipes import (
    CHAT,
    CUSTOM_SFT,
    LARGE_BASE,
    LARGE_CHAT,
    PRETRAIN,
    qlora,
)

FP8 = N_(
    "its weights on the hub are FP8, which cannot be trained: convert them to bfloat16 and put "
    "their place into a copy of deepseek_v3_qlora_alpaca_e3"
)
TOO_LARGE = N_("of 671 billion parameters only 4-bit ones fit into today's machines: use qlora")

CARDS = (
    ModelCard(
        name="deepseek_coder_6_7b_base",
        path="deepseek-ai/deepseek-coder-6.7b-base",
        billions=6.7,
        template="deepseek_coder",
        recipes=qlora("code_alpaca_e3"),
    ),
    ModelCard(
        name="deepseekcoder_6_7b_instruct",
        path="deepseek-ai/deepseek-coder-6.7b-instruct",
        billions=6.7,
        template="deepseek_coder",
        chat=True,
        recipes=(*qlora("code_alpaca_e3"), *CUSTOM_SFT),
    ),
    ModelCard(
        name="deepseek_moe_16b_base",
        path="deepseek-ai/deepseek-moe-16b-base",
        billions=16.4,
        template="deepseek_moe",
        settings={"qlora": {"lora_r": 16, "lora_dropout": 0.05}},
        recipes=(*PRETRAIN, "full_oasst1_e3", "qlora_oasst1_e3"),
    ),
    ModelCard(
        name="deepseek_moe_16b_chat",
        path="deepseek-ai/deepseek-moe-16b-chat",
        billions=16.4,
        template="deepseek_moe",
        chat=True,
        settings={"qlora": {"lora_r": 16, "lora_dropout": 0.05}},
        recipes=(*CUSTOM_SFT, "full_oasst1_e3", "qlora_oasst1_e3"),
    ),
    ModelCard(
        name="deepseek_v2_lite",
        path="deepseek-ai/DeepSeek-V2-Lite",
        billions=15.7,
        recipes=LARGE_BASE,
    ),
    ModelCard(
        name="deepseek_v2_lite_chat",
        path="deepseek-ai/DeepSeek-V2-Lite-Chat",
        billions=15.7,
        template="deepseek_v2",
        chat=True,
        settings={
            "lr": 1e-5,
            "accumulative_counts": 1,
            "dataloader_num_workers": 4,
            "save_steps": 50,
            "evaluation_freq": 50,
            "log_interval": 1,
        },
        recipes=("full_alpaca_e3", "full_alpaca_e3_32k_varlen", *LARGE_CHAT),
    ),
    ModelCard(
        name="deepseek_v2_chat",
        path="deepseek-ai/DeepSeek-V2-Chat",
        billions=235.7,
        template="deepseek_v2",
        chat=True,
        settings={
            "lr": 1e-5,
            "accumulative_counts": 1,
            "dataloader_num_workers": 4,
            "save_steps": 50,
            "evaluation_freq": 25,
            "log_interval": 1,
        },
        recipes=("full_alpaca_e3",),
    ),
    ModelCard(
        name="deepseek_v3_base",
        path="deepseek-ai/DeepSeek-V3-Base",
        billions=671.0,
        unsupported={"full": FP8, "lora": FP8, "qlora": FP8, "int8_lora": FP8},
    ),
    ModelCard(
        name="deepseek_v3",
        path="unsloth/DeepSeek-V3-bf16",  # the official weights are FP8, which cannot be trained
        billions=671.0,
        template="auto",
        chat=True,
        recipes=("qlora_alpaca_e3",),
        unsupported={"full": TOO_LARGE, "lora": TOO_LARGE, "int8_lora": TOO_LARGE},
    ),
    ModelCard(
        name="deepseek_r1_distill_qwen_1_5b",
        path="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        billions=1.8,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="deepseek_r1_distill_qwen_7b",
        path="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        billions=7.6,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="deepseek_r1_distill_qwen_14b",
        path="deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
        billions=14.8,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="deepseek_r1_distill_qwen_32b",
        path="deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
        billions=32.8,
        template="auto",
        chat=True,
        recipes=LARGE_CHAT,
    ),
    ModelCard(
        name="deepseek_r1_distill_llama_8b",
        path="deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        billions=8.0,
        template="auto",
        chat=True,
        recipes=CHAT,
    ),
    ModelCard(
        name="deepseek_r1_distill_llama_70b",
        path="deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
        billions=70.6,
        template="auto",
        chat=True,
        recipes=LARGE_CHAT,
    ),
)
