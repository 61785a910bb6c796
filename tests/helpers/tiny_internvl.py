"""Tiny InternVL folders in the hub's layout, without the code that ``config.json`` names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VISION = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "norm_type": "layer_norm",
    "qk_normalization": False,
    "qkv_bias": True,
    "use_flash_attn": True,
    "drop_path_rate": 0.0,
    "torch_dtype": "bfloat16",
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "internlm2": {
        "architectures": ["InternLM2ForCausalLM"],
        "attn_implementation": "flash_attention_2",
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
        "bias": False,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": 1000000,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        "original_max_position_embeddings": 512,
        "pad_token_id": 2,
        "rope_scaling": {
            "long_factor": [1.1] * 8,
            "short_factor": [1.0] * 8,
            "type": "su",
        },
        "sliding_window": 262144,
    },
    "llama": {"architectures": ["LlamaForCausalLM"], "rope_theta": 5000000.0},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "rope_theta": 1000000.0},
}
"""By ``model_type``, what the folders of InternVL 1.5 and 2 say besides the sizes."""


def internvl_config(language_model: str = "internlm2", vocab_size: int = 512) -> dict[str, Any]:
    """A ``config.json`` as the hub has it, with tiny sizes."""
    language = {"model_type": language_model, "vocab_size": vocab_size, **SIZES}
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
        },
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 32,
        "llm_config": language | LANGUAGE_MODELS[language_model],
        "max_dynamic_patch": 4,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "torch_dtype": "bfloat16",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": VISION,
    }


def save_internvl(folder: Path, language_model: str = "internlm2") -> Path:
    """Save model and tokenizer; four features to a tile of 32 pixels."""
    import torch

    from tests.helpers.tiny import make_tokenizer
    from xtuner.model.transformers_models.auto import AutoConfig, AutoModel

    folder.mkdir(parents=True)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<img>", "<IMG_CONTEXT>", "</img>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    settings = internvl_config(language_model, len(tokenizer))
    file = folder / "config.json"
    file.write_text(json.dumps(settings), "utf-8")
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    file.write_text(json.dumps(settings), "utf-8")
    return folder
