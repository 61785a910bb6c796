"""Whole model folders in the layout of the hub, by family, small and made on the spot.

``config.json`` has the fields that the hub's has, the weights the hub's names, the tokenizer the
hub's files; the Python files raise when they are run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.hub_layouts import write_code, write_tokenizer


@dataclass(frozen=True)
class HubModel:
    """A family's folder.

    Attributes:
        architecture: of ``config.json``.
        auto_map: the class that each Auto class has in the folder's code, by module.
        tokenizer: key of ``hub_layouts.LAYOUTS``.
        config: the rest of ``config.json``.
        recipe: a published config for this family.
        chat_recipe: one of a chat model, whose template the tests use.
    """

    architecture: str
    auto_map: dict[str, str]
    tokenizer: str
    config: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.0",
}


def _internlm2(**config: Any) -> HubModel:
    code = "modeling_internlm2.InternLM2ForCausalLM"
    return HubModel(
        architecture="InternLM2ForCausalLM",
        auto_map={
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": code,
            "AutoModelForCausalLM": code,
        },
        tokenizer="internlm2",
        config={
            "model_type": "internlm2",
            "attn_implementation": "eager",
            "bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "num_key_value_heads": 2,
            "pad_token_id": 2,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000,
            "tie_word_embeddings": False,
            **config,
        },
        recipe="internlm2_5_chat_7b_qlora_alpaca_e3",
    )


MODELS = {
    "internlm": HubModel(
        architecture="InternLMForCausalLM",
        auto_map={
            "AutoConfig": "configuration_internlm.InternLMConfig",
            "AutoModel": "modeling_internlm.InternLMForCausalLM",
            "AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM",
        },
        tokenizer="internlm",
        config={
            "model_type": "internlm",
            "bias": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "pad_token_id": 2,
            "rms_norm_eps": 1e-06,
            "rotary": {"base": 10000, "type": "dynamic"},
            "tie_word_embeddings": False,
        },
        recipe="internlm_chat_7b_qlora_alpaca_e3",
    ),
    "internlm2": _internlm2(rope_scaling={"factor": 1.0, "type": "dynamic"}),
    "internlm2_5": _internlm2(rope_scaling={"factor": 2.0, "type": "dynamic"}, pretraining_tp=1),
}
"""By family; the folders of InternLM2 and 2.5 differ in their scaling."""


def save_hub_model(folder: Path, family: str, **changes: Any) -> Path:
    """Write a family's folder.

    Args:
        folder: made where it does not exist.
        family: a key of ``MODELS``.
        **changes: to ``config.json``.
    """
    import torch

    from xtuner.model.transformers_models.auto import AutoConfig, AutoModelForCausalLM

    model = MODELS[family]
    ids = write_tokenizer(folder, model.tokenizer)
    write_code(folder, *{place.partition(".")[0] for place in model.auto_map.values()})
    vocab_size = -(-ids // 64) * 64
    config = {
        "architectures": [model.architecture],
        "auto_map": model.auto_map,
        "vocab_size": vocab_size,
        **SIZES,
        **model.config,
        **changes,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json").write_text(text, "utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    built.save_pretrained(folder)
    (folder / "config.json").write_text(text, "utf-8")
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(special) + "\n", "utf-8")
    return folder
