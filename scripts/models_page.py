"""Write the table of ``docs/*/models.md``: which class loads each model of the catalogue.

``python scripts/models_page.py``; ``--check`` only compares, with status 1 for a stale page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.helpers.hub_models import MODELS as JOURNEYS
from xtuner.configs.internvl import CARDS as INTERNVL
from xtuner.configs.models import MODELS
from xtuner.model.transformers_models.auto import FAMILIES

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "tests/golden/families"
BEGIN, END = "<!-- scripts/models_page.py -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Kind:
    """An architecture, by the ``model_type`` of ``config.json``.

    Args:
        path: a regular expression for names on the hub.
        model_type: of their ``config.json``.
        brings_code: whether the folders have modeling code (``auto_map``).
    """

    path: str
    model_type: str
    brings_code: bool = False


KINDS = (
    Kind(r"internlm/internlm-", "internlm", True),
    Kind(r"internlm/internlm2", "internlm2", True),
    Kind(r"internlm/internlm3", "internlm3", True),
    Kind(r"OpenGVLab/InternVL3", "internvl"),
    Kind(r"OpenGVLab/", "internvl_chat", True),
    Kind(r"THUDM/chatglm", "chatglm", True),
    Kind(r"baichuan-inc/", "baichuan", True),
    Kind(r"Qwen/Qwen-", "qwen", True),
    Kind(r"openbmb/MiniCPM-", "minicpm", True),
    Kind(r"openbmb/MiniCPM3", "minicpm3", True),
    Kind(r"deepseek-ai/deepseek-moe", "deepseek", True),
    Kind(r"deepseek-ai/DeepSeek-V2", "deepseek_v2", True),
    Kind(r"(deepseek-ai|unsloth)/DeepSeek-V3", "deepseek_v3", True),
    Kind(r"microsoft/(Phi-3|Phi-4|phi-4)", "phi3", True),
    Kind(r"Qwen/Qwen2.5-VL-", "qwen2_5_vl"),
    Kind(r"Qwen/Qwen3-VL-30B", "qwen3_vl_moe"),
    Kind(r"Qwen/Qwen3-VL-", "qwen3_vl"),
    Kind(r"Qwen/Qwen1.5-MoE", "qwen2_moe"),
    Kind(r"Qwen/Qwen(1.5|2|2.5)-|deepseek-ai/DeepSeek-R1-Distill-Qwen", "qwen2"),
    Kind(r"Qwen/Qwen3-(Coder-)?30B", "qwen3_moe"),
    Kind(r"Qwen/Qwen3-", "qwen3"),
    Kind(r"Qwen/Qwen3\.\d-35B", "qwen3_5_moe"),
    Kind(r"Qwen/Qwen3\.\d-", "qwen3_5"),
    Kind(r"meta-llama/Llama-4-", "llama4"),
    Kind(
        r"huggyllama/|meta-llama/|lmsys/|01-ai/|tiiuae/Falcon3|HuggingFaceTB/SmolLM2|"
        r"deepseek-ai/(deepseek-coder|DeepSeek-R1-Distill-Llama)",
        "llama",
    ),
    Kind(r"mistralai/(Ministral-3-|Mistral-Small-3.2-)", "mistral3"),
    Kind(r"mistralai/Mistral-|HuggingFaceH4/", "mistral"),
    Kind(r"mistralai/Mixtral", "mixtral"),
    Kind(r"zai-org/glm-4-9b", "glm"),
    Kind(r"zai-org/GLM-4-", "glm4"),
    Kind(r"zai-org/GLM-4.5-", "glm4_moe"),
    Kind(r"zai-org/GLM-4.6V-Flash", "glm46v"),
    Kind(r"zai-org/GLM-4.7-Flash", "glm4_moe_lite"),
    Kind(r"google/gemma-\d+b", "gemma"),
    Kind(r"google/gemma-2-", "gemma2"),
    Kind(r"google/gemma-3-(270m|1b)", "gemma3_text"),
    Kind(r"google/gemma-3-", "gemma3"),
    Kind(r"google/gemma-3n-", "gemma3n"),
    Kind(r"google/gemma-4-12B", "gemma4_unified"),
    Kind(r"google/gemma-4-", "gemma4"),
    Kind(r"bigcode/starcoder$", "gpt_bigcode"),
    Kind(r"bigcode/starcoder2", "starcoder2"),
    Kind(r"CohereLabs/.*-v01", "cohere"),
    Kind(r"CohereLabs/.*r7b", "cohere2"),
    Kind(r"HuggingFaceTB/SmolVLM2", "smolvlm"),
    Kind(r"llava-hf/llava-onevision", "llava_onevision"),
    Kind(r"HuggingFaceTB/SmolLM3", "smollm3"),
    Kind(r"allenai/OLMo-2-", "olmo2"),
    Kind(r"allenai/Olmo-3-", "olmo3"),
    Kind(r"ibm-granite/granite-3", "granite"),
    Kind(r"ibm-granite/granite-4", "granitemoehybrid"),
    Kind(r"unsloth/gpt-oss-", "gpt_oss"),
    Kind(r"nvidia/NVIDIA-Nemotron-3-", "nemotron_h", True),
    Kind(r"ByteDance-Seed/Seed-OSS-", "seed_oss"),
    Kind(r"LiquidAI/LFM2", "lfm2"),
    Kind(r"LiquidAI/LFM3", "lfm3"),
    Kind(r"tencent/Hunyuan-", "hunyuan_v1_dense"),
    Kind(r"baidu/ERNIE-4.5-21B-A3B", "ernie4_5_moe", True),
    Kind(r"baidu/ERNIE-4.5-", "ernie4_5", True),
    Kind(r"LGAI-EXAONE/EXAONE-4.0-", "exaone4"),
    Kind(r"swiss-ai/Apertus-", "apertus"),
)
"""Of several that match the first one counts."""
HEAD = {
    "en": "| models | `model_type` | class | code of the folder | tried |\n|---|---|---|---|---|\n",
    "zh_cn": "| 模型 | `model_type` | 类 | 文件夹中的代码 | 验证 |\n|---|---|---|---|---|\n",
}
CODE = {"en": ("none", "not run"), "zh_cn": ("无", "不运行")}
IN_TRANSFORMERS = {"en": "transformers' `{}`", "zh_cn": "transformers 的 `{}`"}
TRIED = {
    "hub": {"en": "against the hub's code", "zh_cn": "与 hub 代码对比"},
    "llama": {"en": "against transformers' Llama", "zh_cn": "与 transformers 的 Llama 对比"},
    "vision": {
        "en": "image features against the hub's code",
        "zh_cn": "图片特征与 hub 代码对比",
    },
    "journey": {"en": "its recipe, end to end", "zh_cn": "完整流程"},
    "rows": {"en": "packed and padded rows", "zh_cn": "打包与填充的行"},
}


def kind_of(path: str) -> Kind:
    """The architecture of a name on the hub.

    Raises:
        LookupError: when none matches.
    """
    for kind in KINDS:
        if re.match(kind.path, path):
            return kind
    raise LookupError(f"{path}: which model_type? Add it to KINDS")


def models_of_kinds() -> dict[Kind, list[str]]:
    """The names of the catalogue's models, by architecture."""
    found: dict[Kind, list[str]] = {kind: [] for kind in KINDS}
    for card in MODELS.values():
        found[kind_of(card.path)].append(card.name)
    for vision in INTERNVL:
        found[kind_of(vision.path)].append(f"internvl_{vision.name}")
    return found


def class_of(model_type: str, language: str) -> str:
    """The class that loads it: for text, or for images and text where there is such a one."""
    if model_type not in FAMILIES:
        sees = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
        named = sees or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
        return IN_TRANSFORMERS[language].format(named)
    name = FAMILIES[model_type].models["AutoModelForCausalLM"]
    names = (name,) if isinstance(name, str) else name
    return "XTuner: " + ", ".join(f"`{name}`" for name in names)


def tried(model_type: str, language: str) -> str:
    """How the class was tried."""
    words = []
    if (FIGURES / f"{model_type}.json").is_file():
        words.append(TRIED["llama" if model_type == "internlm3" else "hub"][language])
    if (FIGURES / f"vision/{model_type}.json").is_file():
        words.append(TRIED["vision"][language])
    if model_type in {str(model.config["model_type"]) for model in JOURNEYS.values()}:
        words.append(TRIED["journey"][language])
    return ("; " if language == "en" else "；").join(words or [TRIED["rows"][language]])


def rows(language: str) -> Iterator[str]:
    """A line for each architecture."""
    for kind, names in models_of_kinds().items():
        cells = (
            ", ".join(names),
            f"`{kind.model_type}`",
            class_of(kind.model_type, language),
            CODE[language][kind.brings_code],
            tried(kind.model_type, language),
        )
        yield f"| {' | '.join(cells)} |\n"


def page(language: str) -> str:
    """The text of ``models.md`` with the table of now."""
    text = (ROOT / "docs" / language / "models.md").read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + HEAD[language] + "".join(rows(language)) + "\n" + END + after


def main(words: list[str]) -> int:
    """Write or check both pages."""
    stale = 0
    for language in HEAD:
        file = ROOT / "docs" / language / "models.md"
        text = page(language)
        if file.read_text("utf-8") != text:
            stale = 1
            if "--check" not in words:
                file.write_text(text, "utf-8")
    return stale if "--check" in words else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
