"""Tiny settings for any configuration class of transformers, from its defaults.

The names of sizes are few, however many architectures there are: each is given a small value where
a class has it. Lists with an item for each layer keep two layers of different kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

LAYERS = 2
WIDTH = 64
_SIZES: dict[int, str] = {
    1: "n_group topk_group num_expert_group n_groups mamba_n_groups first_k_dense_replace "
    "n_shared_experts num_shared_experts moe_num_shared_experts num_hash_layers "
    "moe_layer_start_index moe_layer_end_index num_nextn_predict_layers num_mtp_layers "
    "num_layers_per_stack num_query_tokens o_groups L_bp_cycles",
    2: "num_experts_per_tok num_experts_per_token moe_topk moe_k n_layer n_layers "
    "num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers "
    "attn_layer_period heads_per_ngram num_hidden_layers swa_num_key_value_heads "
    "num_key_value_heads num_query_groups zero_expert_num num_codebooks kv_heads "
    "num_linear_key_heads linear_num_key_heads index_topk_blocks split_ngram_parts "
    "hc_sinkhorn_iters",
    4: "num_experts num_local_experts n_routed_experts moe_num_experts sliding_window "
    "sliding_window_size attention_chunk_size index_topk n_head n_heads num_heads "
    "num_attention_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "num_kv_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads "
    "linear_num_heads linear_num_value_heads index_block_size num_centroids window_size "
    "local_attention attention_window_size keep_window_size block_size",
    8: "index_n_heads rotary_dim qk_rope_head_dim mamba_d_state state_size ssm_state_size "
    "chunk_size mamba_chunk_size mamba_n_heads mamba_num_heads n_mamba_heads laurel_rank "
    "rel_extent max_time mamba_dt_rank time_step_rank hc_lowrank",
    16: "head_dim attention_head_size d_head d_kv d_rel dim_head index_head_dim kv_channels "
    "linear_head_dim mamba_head_dim mamba_d_head swa_head_dim linear_key_head_dim "
    "linear_value_head_dim global_head_dim q_lora_rank kv_lora_rank qk_nope_head_dim "
    "v_head_dim o_lora_rank hidden_size_per_layer_input gated_norm_rank adapter_rank "
    "router_hidden_size prompt_mid_dim prompt_length swa_v_head_dim",
    32: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
    "moe_shared_expert_intermediate_size mamba_headdim attention_head_dim ple_embed_dim "
    "shared_intermediate_size shared_experts_intermediate_size",
    WIDTH: "hidden_size n_embd d_model emb_dim embedding_dim embedding_size lru_width "
    "input_embedding_size output_embedding_size word_embed_proj_dim mamba_d_ssm "
    "attention_hidden_size backbone_hidden_size pronunciation_embed_dim shape_embed_dim "
    "projection_dim out_hidden_size dim_model_base embedding_hidden_size",
    128: "intermediate_size intermediate_size_mlp ffn_dim ffn_hidden_size d_ff d_inner dff "
    "dim_ff decoder_ffn_dim encoder_ffn_dim feed_forward_size dense_intermediate_size",
    512: "vocab_size decoder_vocab_size vocab_size_per_layer_input max_position_embeddings "
    "n_positions n_ctx max_seq_len context_length max_source_positions max_target_positions "
    "pronunciation_vocab_size shape_vocab_size ngram_vocab_size_base unpadded_vocab_size "
    "encoder_hash_byte_group_vocab original_max_position_embeddings",
}
SIZES: dict[str, int] = {name: size for size, names in _SIZES.items() for name in names.split()}
"""A tiny value of each setting that is a size."""


def tiny_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Make the settings of a tiny model with two layers.

    Args:
        config: an architecture's default configuration.
    """
    own = vars(config)
    return {**cut_to_layers(own, _two_kinds(own)), **tiny_sizes(own)}


def tiny_sizes(own: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of a tiny model.

    Args:
        own: the settings of a configuration by name.
    """
    sizes = {name: size for name, size in SIZES.items() if _is_size(own.get(name))}
    if "qk_rope_head_dim" in sizes:  # latent attention: keys are rotated in this part alone
        sizes["head_dim"] = sizes["qk_rope_head_dim"]
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return sizes


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def per_layer_lists(own: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """The settings that are lists with an item for each of more than two layers."""
    layers = own.get("num_hidden_layers") or own.get("num_layers") or 0
    return {
        name: value
        for name, value in own.items()
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == layers > 2
    }


def cut_to_layers(own: Mapping[str, Any], layers: Sequence[int]) -> dict[str, list[Any]]:
    """The lists with an item for each layer, cut to some of the layers."""
    lists = per_layer_lists(own)
    return {name: [value[number] for number in layers] for name, value in lists.items()}


def _two_kinds(own: Mapping[str, Any]) -> tuple[int, int]:
    """The first layer, and the first one of another kind by the lists."""
    items = list(zip(*per_layer_lists(own).values(), strict=True))
    return 0, next((n for n, item in enumerate(items) if item != items[0]), 1)


def tiny_parts(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Make the settings of the configurations inside one, such as those of towers, by name."""
    text = config.get_text_config()
    return {
        name: {"model_type": part.model_type, **tiny_settings(part), **tiny_parts(part)}
        for name, part in vars(config).items()
        if isinstance(part, PreTrainedConfig) and part is not text
    }
