"""The configuration of InternLM3."""

from __future__ import annotations

from typing import Any, ClassVar

from xtuner.model.transformers_models.hub_config import HubConfig
from xtuner.model.transformers_models.unsupported import refuse_other


class InternLM3Config(HubConfig):
    """Settings of an InternLM3 model, under the names of the hub's ``config.json``.

    Args:
        qkv_bias: whether the layers of queries, keys and values have biases.
        bias: whether the other linear layers have.

    Raises:
        UserError: where the two differ; the published models have neither.
    """

    model_type = "internlm3"
    keys_to_ignore_at_inference = ["past_key_values"]
    # what transformers' Llama layers, which compute the same, read besides
    attribute_map: ClassVar[dict[str, str]] = {"attention_bias": "qkv_bias", "mlp_bias": "bias"}

    vocab_size: int = 128512
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    bias: bool = False
    attention_dropout: float = 0.0
    rope_parameters: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        refuse_other(self, bias=self.qkv_bias)

    def hub_rope(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The fields ``rope_theta`` and ``rope_scaling``; the kind is called ``rope_type``."""
        fields = super().hub_rope(parameters)
        scaling = fields["rope_scaling"]
        if scaling is not None:
            fields["rope_scaling"] = {"rope_type": scaling.pop("type"), **scaling}
        return fields
