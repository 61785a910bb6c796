"""Tiny random models of transformers' own architectures, by their ``model_type``."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from xtuner.proving.tiny_settings import tiny_parts, tiny_settings

VOCABULARY = 512

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
}
LATENT_ATTENTION: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
DELTA_NET: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
WINDOWS: dict[str, Any] = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}

MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
"""Positions of three dimensions share the 8 rotations of a head."""
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl_text": {"rope_parameters": MROPE},
    "glm4v_text": {"rope_parameters": MROPE},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "deepseek_v2": {**EXPERTS, **LATENT_ATTENTION},
    "deepseek_v3": {**EXPERTS, **LATENT_ATTENTION, "head_dim": 8},
    "dots1": EXPERTS,
    "ernie4_5_moe": {
        **EXPERTS,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
    },
    "exaone4": WINDOWS,
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "mamba_n_heads": 4},
    "gemma3_text": WINDOWS,
    "gemma3n_text": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
    },
    "gemma4_text": {
        **WINDOWS,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "global_head_dim": 32,
    },
    "gemma4_unified_text": {**WINDOWS, "global_head_dim": 32},
    "glm4_moe": EXPERTS,
    "glm4_moe_lite": {**EXPERTS, **LATENT_ATTENTION, "head_dim": 8},
    "gpt_oss": {**EXPERTS, **WINDOWS},
    "granitemoe": EXPERTS,
    "granitemoehybrid": {**EXPERTS, **MAMBA, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_moe": {**EXPERTS, "moe_topk": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {
        **EXPERTS,
        "intermediate_size_mlp": 128,
        "attention_chunk_size": 4,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "moe_layers": [1],
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "chunk_size": 8, "n_groups": 1},
    "minicpm3": {"num_key_value_heads": 4},
    "minimax": {**EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": 4},
    "minimax_m2": EXPERTS,
    "mixtral": EXPERTS,
    "nemotron_h": {
        **EXPERTS,
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "olmo3": WINDOWS,
    "olmo_hybrid": DELTA_NET,
    "olmoe": EXPERTS,
    "phimoe": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_5_moe_text": {**EXPERTS, **DELTA_NET},
    "qwen3_5_text": DELTA_NET,
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**EXPERTS, **DELTA_NET},
}
"""What a tiny model of a kind needs beside ``BASE``."""
MULTIMODAL = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "glm46v": "glm4v_text",
    "internvl": "qwen3",
    "llama4": "llama4_text",
    "llava_onevision": "qwen2",
    "mistral3": "ministral3",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "smolvlm": "llama",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
"""The kind of the language model inside a multimodal one."""
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": BASE["hidden_size"],
}
"""A tiny vision tower, in the words of all of them."""


_TINY_PART: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
_WINDOW_KINDS = ("sliding_attention", "full_attention")
_ROTARY: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
OMITTED: Any = object()
"""A setting that a configuration does not take."""
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {**WINDOWS, "rope_parameters": dict.fromkeys(_WINDOW_KINDS, _ROTARY)},
    "deepseek_v4": {
        "compress_rates": {"heavily_compressed_attention": 3, "compressed_sparse_attention": 2}
    },
    "falcon": {"num_attention_heads": 4, "head_dim": OMITTED},
    "jamba": {"attn_layer_offset": 1},
    "opt": {"word_embed_proj_dim": 64},
    "prophetnet": {"num_hidden_layers": OMITTED},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "axial_pos_embds_dim": (32, 32),
        "axial_pos_shape": (16, 32),
        "attn_layers": ["local", "lsh"],
        "is_decoder": True,
    },
    "xmod": {"default_language": "en_XX"},
    "xlnet": {"max_position_embeddings": OMITTED},
    "zamba": {"head_dim": OMITTED, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"head_dim": OMITTED, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}
"""What language models need beside sizes."""
WHOLE: dict[str, dict[str, Any]] = {
    "blt": {
        "patcher_config": {**_TINY_PART, "vocab_size": VOCABULARY},
        "encoder_config": {**_TINY_PART, "vocab_size": VOCABULARY, "hidden_size_global": 64},
        "decoder_config": {**_TINY_PART, "vocab_size": VOCABULARY, "hidden_size_global": 64},
        "global_config": _TINY_PART,
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_out_dim": 64, "adapter_input_size": 64},
    },
    "gemma3n": {  # needs timm, of which this is the smallest model
        "vision_config": {"architecture": "test_resnet", "hidden_size": 32, "vocab_offset": 500},
        "audio_config": {
            "hidden_size": 32,
            "vocab_offset": 506,
            "conf_num_hidden_layers": 1,
            "conf_num_attention_heads": 4,
            "input_feat_size": 32,
            "sscp_conv_channel_size": [8, 4],
        },
    },
    "phi4_multimodal": {
        "audio_config": {
            "num_blocks": 3,
            "ext_pw_out_channel": 64,
            "depthwise_separable_out_channel": 64,
            "nemo_conv_channels": 64,
        }
    },
}
"""What whole configurations need beside their language model's settings."""


def make_config(kind: str, **changes: Any) -> PreTrainedConfig:
    """Make the configuration of a tiny model.

    Args:
        kind: a ``model_type`` of transformers.
        changes: to the settings of its language model.
    """
    inner = MULTIMODAL.get(kind, kind)
    if inner in SETTINGS or kind in MULTIMODAL:
        settings = {**BASE, **SETTINGS.get(inner, {}), **changes}
        if inner == kind:
            return AutoConfig.for_model(kind, **settings)
        text = {**settings, "model_type": inner}
        parts = {"vision_config": VISION, **WHOLE.get(kind, {})}
        return AutoConfig.for_model(kind, text_config=text, **parts)
    defaults = AutoConfig.for_model(kind)
    text_defaults = defaults.get_text_config()
    settings = {
        **BASE,
        **tiny_settings(text_defaults),
        **SPECIAL.get(text_defaults.model_type, {}),
        **SPECIAL.get(kind, {}),
        **changes,
    }
    settings = {name: value for name, value in settings.items() if value is not OMITTED}
    whole = _joined(tiny_parts(defaults), WHOLE.get(kind, {}))
    if text_defaults is defaults:
        return AutoConfig.for_model(kind, **{**whole, **settings})
    name = next(name for name, part in vars(defaults).items() if part is text_defaults)
    text = {"model_type": text_defaults.model_type, **settings}
    return AutoConfig.for_model(kind, **{name: text}, **whole, **tiny_settings(defaults))


def _joined(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Two nested settings in one."""
    found = dict(settings)
    for name, value in more.items():
        inner = found.get(name)
        is_nested = isinstance(inner, dict) and isinstance(value, dict)
        found[name] = _joined(inner, value) if is_nested else value
    return found


def make_architecture(
    kind: str,
    *,
    attention: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> PreTrainedModel:
    """Make a model with random weights.

    Args:
        kind: a ``model_type`` of transformers.
        attention: its ``attn_implementation``.
        dtype: of the weights.
        seed: of the weights.
        changes: to the settings of its language model.
    """
    torch.manual_seed(seed)
    config = make_config(kind, **changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
