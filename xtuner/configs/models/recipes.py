"""Sets of recipes that several published models share: what ``list-cfg`` shows of a model.

A recipe is the rest of a config's name after the model's: method, dataset and epochs.
"""

from __future__ import annotations


def qlora(*datasets: str) -> tuple[str, ...]:
    """The recipes that train with QLoRA on each of these datasets."""
    return tuple(f"qlora_{dataset}" for dataset in datasets)


PRETRAIN = ("full_custom_pretrain_e1",)
CUSTOM_SFT = ("qlora_custom_sft_e1",)
ALPACAS = qlora("alpaca_e3", "alpaca_enzh_e3", "alpaca_enzh_oasst1_e3", "alpaca_zh_e3")
OASST1 = qlora("oasst1_e3", "oasst1_512_e3")
TASKS = qlora("arxiv_gentitle_e3", "code_alpaca_e3", "colorist_e5", "lawyer_e3", "sql_e3")
LARGE = qlora("medical_e1", "openorca_e1", "tiny_codes_e1")
MOSS = qlora("moss_sft_all_e1", "moss_sft_all_e2_gpu8", "moss_sft_plugins_e1")
PLATYPUS = qlora("open_platypus_e3")
CLASSIC = ALPACAS + OASST1 + TASKS + PLATYPUS + LARGE
FULL_AND_QLORA = ("full_alpaca_e3", "qlora_alpaca_e3")
REACT = ("qlora_msagent_react_e3_gpu8",)

# What today's models show.
BASE = ("full_alpaca_e3", "lora_alpaca_e3", "qlora_alpaca_e3", "full_custom_pretrain_e1")
CHAT = (
    "full_alpaca_e3",
    "lora_alpaca_e3",
    "qlora_alpaca_e3",
    "full_custom_sft_e1",
    "lora_custom_sft_e1",
    "qlora_custom_sft_e1",
)
CHAT_PREFERENCE = (
    *CHAT,
    "dpo_lora_varlenattn_ultrafeedback_e1",
    "orpo_lora_varlenattn_ultrafeedback_e1",
)
REWARD = ("reward_lora_varlenattn_ultrafeedback_e1",)
LARGE_BASE = ("qlora_alpaca_e3", "qlora_custom_pretrain_e1")
LARGE_CHAT = ("qlora_alpaca_e3", "qlora_custom_sft_e1")

# Images: LLaVA's instructions, and rows of one's own.
VISION = tuple(
    f"{method}_{dataset}_e1"
    for dataset in ("llava_instruct", "custom_vision")
    for method in ("full", "lora", "qlora")
)
LARGE_VISION = tuple(recipe for recipe in VISION if not recipe.startswith("full"))
