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


@dataclass(frozen=True)
class HubModel:
    """A family's folder.

    Attributes:
        architecture: of ``config.json``.
        auto_map: the class that each Auto class has in the folder's code, by module.
        tokenizer: key of ``hub_layouts.LAYOUTS``.
        config: the rest of ``config.json``.
        recipe: a published config for this family.
        sizes: the fields of ``config.json`` that make the model small.
        vocabulary: the field with the number of tokens.
        chat_recipe: one of a chat model, whose template the tests use.
    """

    architecture: str
    auto_map: dict[str, str]
    tokenizer: str
    config: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    sizes: dict[str, Any] = field(default_factory=SIZES.copy)
    vocabulary: str = "vocab_size"


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


def _auto_map(module: str, config: str, causal: str, **others: str) -> dict[str, str]:
    """``auto_map`` of ``config.json`` for a family's modules."""
    classes = {"AutoModelForCausalLM": causal, **others}
    return {"AutoConfig": f"configuration_{module}.{config}"} | {
        auto: f"modeling_{module}.{name}" for auto, name in classes.items()
    }


def _chatglm(tokenizer: str, recipe: str) -> HubModel:
    causal = "ChatGLMForConditionalGeneration"
    return HubModel(
        architecture="ChatGLMModel",
        auto_map=_auto_map(
            "chatglm", "ChatGLMConfig", causal, AutoModel=causal, AutoModelForSeq2SeqLM=causal
        ),
        tokenizer=tokenizer,
        config={
            "model_type": "chatglm",
            "add_bias_linear": False,
            "add_qkv_bias": True,
            "apply_query_key_layer_scaling": True,
            "apply_residual_connection_post_layernorm": False,
            "attention_dropout": 0.0,
            "attention_softmax_in_fp32": True,
            "bias_dropout_fusion": True,
            "eos_token_id": 2,
            "fp32_residual_connection": False,
            "hidden_dropout": 0.0,
            "layernorm_epsilon": 1e-05,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "original_rope": True,
            "pad_token_id": 0,
            "post_layer_norm": True,
            "rmsnorm": True,
            "seq_length": 8192,
            "tie_word_embeddings": False,
            "use_cache": True,
        },
        recipe=recipe,
        sizes={
            "ffn_hidden_size": 160,
            "hidden_size": 64,
            "kv_channels": 16,
            "num_attention_heads": 4,
            "num_layers": 2,
            "torch_dtype": "float16",
            "transformers_version": "4.30.2",
        },
        vocabulary="padded_vocab_size",
    )


def _baichuan(tokenizer: str, recipe: str, kind: str = "Baichuan", **config: Any) -> HubModel:
    causal = f"{kind}ForCausalLM"
    return HubModel(
        architecture=causal,
        auto_map=_auto_map("baichuan", f"{kind}Config", causal),
        tokenizer=tokenizer,
        config={
            "model_type": "baichuan",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "pad_token_id": 0,
            "rms_norm_eps": 1e-06,
            "tie_word_embeddings": False,
            **config,
        },
        recipe=recipe,
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
    "internlm3": HubModel(
        architecture="InternLM3ForCausalLM",
        auto_map=_auto_map(
            "internlm3", "InternLM3Config", "InternLM3ForCausalLM", AutoModel="InternLM3Model"
        ),
        tokenizer="internlm3",
        config={
            "model_type": "internlm3",
            "attention_dropout": 0.0,
            "bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 16,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "num_key_value_heads": 2,
            "pad_token_id": 2,
            "qkv_bias": False,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
            "rope_theta": 50000000,
        },
        recipe="internlm3_8b_instruct_qlora_alpaca_e3",
    ),
    "chatglm2": _chatglm("chatglm2", "chatglm2_6b_qlora_alpaca_e3"),
    "chatglm3": _chatglm("chatglm3", "chatglm3_6b_qlora_alpaca_e3"),
    "qwen": HubModel(
        architecture="QWenLMHeadModel",
        auto_map=_auto_map("qwen", "QWenConfig", "QWenLMHeadModel"),
        tokenizer="qwen",
        config={
            "model_type": "qwen",
            "attn_dropout_prob": 0.0,
            "bf16": False,
            "emb_dropout_prob": 0.0,
            "fp16": False,
            "fp32": False,
            "kv_channels": 16,
            "layer_norm_epsilon": 1e-06,
            "max_position_embeddings": 8192,
            "no_bias": True,
            "onnx_safe": None,
            "rotary_emb_base": 10000,
            "rotary_pct": 1.0,
            "scale_attn_weights": True,
            "seq_length": 8192,
            "tie_word_embeddings": False,
            "tokenizer_class": "QWenTokenizer",
            "use_dynamic_ntk": True,
            "use_flash_attn": "auto",
            "use_logn_attn": True,
        },
        recipe="qwen_7b_chat_qlora_alpaca_e3",
    ),
    "baichuan_7b": _baichuan(
        "baichuan",
        "baichuan_7b_qlora_alpaca_e3",
        kind="BaiChuan",
        max_position_embeddings=4096,
    ),
    "baichuan_13b": _baichuan(
        "baichuan", "baichuan_13b_chat_qlora_alpaca_e3", model_max_length=4096
    ),
    "baichuan2_7b": _baichuan(
        "baichuan2",
        "baichuan2_7b_chat_qlora_alpaca_e3",
        max_position_embeddings=4096,
        model_max_length=4096,
        tokenizer_class="BaichuanTokenizer",
        norm_head=True,  # which a vocabulary of 125,696 says by itself
    ),
    "baichuan2_13b": _baichuan(
        "baichuan2",
        "baichuan2_13b_chat_qlora_alpaca_e3",
        gradient_checkpointing=False,
        model_max_length=4096,
        tokenizer_class="BaichuanTokenizer",
        norm_head=True,  # which a vocabulary of 125,696 says by itself
    ),
    "orion": HubModel(
        architecture="OrionForCausalLM",
        auto_map=_auto_map("orion", "OrionConfig", "OrionForCausalLM"),
        tokenizer="orion",
        config={
            "model_type": "orion",
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "num_key_value_heads": 4,
            "pad_token_id": 0,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        },
        recipe="yi1_5_6b_qlora_alpaca_e3",
    ),
    "yi": HubModel(
        architecture="YiForCausalLM",
        auto_map=_auto_map("yi", "YiConfig", "YiForCausalLM", AutoModel="YiModel"),
        tokenizer="yi",
        config={
            "model_type": "Yi",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-05,
            "rope_theta": 5000000.0,
            "tie_word_embeddings": False,
        },
        recipe="yi1_5_6b_qlora_alpaca_e3",
    ),
    "minicpm": HubModel(
        architecture="MiniCPMForCausalLM",
        auto_map=_auto_map(
            "minicpm", "MiniCPMConfig", "MiniCPMForCausalLM", AutoModel="MiniCPMModel"
        ),
        tokenizer="minicpm",
        config={
            "model_type": "minicpm",
            "bos_token_id": 1,
            "dim_model_base": 16,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "scale_depth": 1.4,
            "scale_emb": 12,
        },
        recipe="minicpm_2b_qlora_alpaca_e3",
    ),
    "deepseek": HubModel(
        architecture="DeepseekForCausalLM",
        auto_map=_auto_map(
            "deepseek", "DeepseekConfig", "DeepseekForCausalLM", AutoModel="DeepseekModel"
        ),
        tokenizer="deepseek",
        config={
            "model_type": "deepseek",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "aux_loss_alpha": 0.001,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "first_k_dense_replace": 1,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "moe_intermediate_size": 48,
            "moe_layer_freq": 1,
            "n_routed_experts": 4,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 4,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 10000,
            "scoring_func": "softmax",
            "seq_aux": True,
            "tie_word_embeddings": False,
        },
        recipe="deepseek_moe_16b_chat_qlora_alpaca_e3",
    ),
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
        model.vocabulary: vocab_size,
        **model.sizes,
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
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {name: config[name] for name in names if name in config}
    (folder / "generation_config.json").write_text(json.dumps(special) + "\n", "utf-8")
    return folder
