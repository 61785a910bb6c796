"""Models that take images: Qwen-VL, InternVL, LLaVA-OneVision, SmolVLM, Mistral Small, GLM-V.

Gemma 3 and 4, Qwen3.5 and later, and Ministral 3 take images too; their cards are in their
families' files.
"""

from __future__ import annotations

from xtuner.configs.cards import ModelCard
from xtuner.configs.models.recipes import LARGE_VISION, VISION

_MODELS = (
    ("qwen2_5_vl_3b_instruct", "Qwen/Qwen2.5-VL-3B-Instruct", 3.8),
    ("qwen2_5_vl_7b_instruct", "Qwen/Qwen2.5-VL-7B-Instruct", 8.3),
    ("qwen2_5_vl_32b_instruct", "Qwen/Qwen2.5-VL-32B-Instruct", 33.5),
    ("qwen2_5_vl_72b_instruct", "Qwen/Qwen2.5-VL-72B-Instruct", 73.4),
    ("qwen3_vl_2b_instruct", "Qwen/Qwen3-VL-2B-Instruct", 2.1),
    ("qwen3_vl_4b_instruct", "Qwen/Qwen3-VL-4B-Instruct", 4.4),
    ("qwen3_vl_8b_instruct", "Qwen/Qwen3-VL-8B-Instruct", 8.8),
    ("qwen3_vl_32b_instruct", "Qwen/Qwen3-VL-32B-Instruct", 33.4),
    ("qwen3_vl_30b_a3b_instruct", "Qwen/Qwen3-VL-30B-A3B-Instruct", 31.1),
    ("internvl3_5_1b", "OpenGVLab/InternVL3_5-1B-HF", 1.1),
    ("internvl3_5_2b", "OpenGVLab/InternVL3_5-2B-HF", 2.3),
    ("internvl3_5_4b", "OpenGVLab/InternVL3_5-4B-HF", 4.7),
    ("internvl3_5_8b", "OpenGVLab/InternVL3_5-8B-HF", 8.5),
    ("internvl3_5_14b", "OpenGVLab/InternVL3_5-14B-HF", 15.1),
    ("internvl3_5_38b", "OpenGVLab/InternVL3_5-38B-HF", 38.4),
    ("llava_onevision_0_5b", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", 0.9),
    ("llava_onevision_7b", "llava-hf/llava-onevision-qwen2-7b-ov-hf", 8.0),
    ("smolvlm2_256m_instruct", "HuggingFaceTB/SmolVLM2-256M-Video-Instruct", 0.3),
    ("smolvlm2_500m_instruct", "HuggingFaceTB/SmolVLM2-500M-Video-Instruct", 0.5),
    ("smolvlm2_2_2b_instruct", "HuggingFaceTB/SmolVLM2-2.2B-Instruct", 2.2),
    ("mistral_small_3_2_24b_instruct", "mistralai/Mistral-Small-3.2-24B-Instruct-2506", 24.0),
    ("glm4_6v_flash", "zai-org/GLM-4.6V-Flash", 10.3),
)
CARDS = tuple(
    ModelCard(
        name,
        path,
        billions,
        template="auto",
        chat=True,
        kind="vision",
        recipes=VISION if billions < 20 else LARGE_VISION,
    )
    for name, path, billions in _MODELS
)
