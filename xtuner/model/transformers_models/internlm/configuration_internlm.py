"""The configuration of InternLM."""

from __future__ import annotations

from typing import Any, ClassVar

from xtuner.model.transformers_models.hub_config import HubConfig

UNSCALED = "origin"
"""What the hub calls a rotary embedding that is not scaled."""


class InternLMConfig(HubConfig):
    """Settings of an InternLM model, under the names of the hub's ``config.json``.

    The rotary embedding's settings are under ``rotary`` there: ``base``, ``type`` (``origin`` or
    ``dynamic``, the default) and ``scaling_factor``; here they are kept as ``rope_parameters``.
    """

    model_type = "internlm"
    keys_to_ignore_at_inference = ["past_key_values"]
    # what transformers' Llama layers, which compute the same, read besides
    attribute_map: ClassVar[dict[str, str]] = {"attention_bias": "bias"}
    mlp_bias: ClassVar[bool] = False
    attention_dropout: ClassVar[float] = 0.0

    vocab_size: int = 103168
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    bias: bool = True
    rope_parameters: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_key_value_heads = self.num_attention_heads
        rotary = {"base": 10000, "type": "dynamic"} | (kwargs.pop("rotary", None) or {})
        if self.rope_parameters is None and not kwargs.get("rope_scaling"):
            self.rope_parameters = {"rope_theta": rotary["base"], "rope_type": "default"}
            if rotary["type"] != UNSCALED:
                factor = rotary.get("scaling_factor", 1.0)
                self.rope_parameters |= {"rope_type": rotary["type"], "factor": factor}
        super().__post_init__(**kwargs)

    def hub_rope(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The field ``rotary``."""
        kind = parameters["rope_type"]
        rotary = {"base": parameters["rope_theta"], "type": UNSCALED if kind == "default" else kind}
        if "factor" in parameters:
            rotary["scaling_factor"] = parameters["factor"]
        return {"rotary": rotary}
