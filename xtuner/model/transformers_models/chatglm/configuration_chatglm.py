"""The configuration of ChatGLM2 and ChatGLM3."""

from __future__ import annotations

from typing import Any

from xtuner.model.transformers_models.hub_config import HubConfig
from xtuner.model.transformers_models.unsupported import refuse_other


class ChatGLMConfig(HubConfig):
    """Settings of a ChatGLM model, under the names of the hub's ``config.json``.

    ``rope_ratio`` (models of 32k and more) multiplies the base of the rotary embedding. Fields that
    choose how the hub's code computes, not what, are kept and not read; ``original_rope`` is
    declared, as that code has no default for it.

    Raises:
        UserError: for weights in int4 or int8, and for P-Tuning v2.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "vocab_size": "padded_vocab_size",
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "seq_length",
        "head_dim": "kv_channels",
    }

    num_layers: int = 28
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    seq_length: int = 2048
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    layernorm_epsilon: float = 1e-5
    rmsnorm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    post_layer_norm: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    multi_query_attention: bool = False
    multi_query_group_num: int = 1
    rope_ratio: float = 1.0
    original_rope: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        refuse_other(self, quantization_bit=0, pre_seq_len=None, fp32_residual_connection=False)
        if not self.multi_query_attention:
            self.multi_query_group_num = self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Key heads, each for a group of query heads."""
        return self.multi_query_group_num

    def to_dict(self) -> dict[str, Any]:
        """With the name of the body in ``architectures``, as the hub has it."""
        fields = super().to_dict()
        if fields.get("architectures") == ["ChatGLMForConditionalGeneration"]:
            fields["architectures"] = ["ChatGLMModel"]
        return fields
