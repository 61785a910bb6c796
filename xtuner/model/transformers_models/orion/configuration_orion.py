"""The configuration of Orion."""

from __future__ import annotations

from transformers.models.llama.configuration_llama import LlamaConfig

from xtuner.model.transformers_models.hub_config import HubConfig


class OrionConfig(HubConfig, LlamaConfig):
    """Settings of an Orion model, under the names of the hub's ``config.json``.

    ``rms_norm_eps`` is there the epsilon of the LayerNorms.
    """

    model_type = "orion"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 84608
    intermediate_size: int = 15360
    num_hidden_layers: int = 40
    num_attention_heads: int = 40
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
