"""The configuration of InternLM2 and InternLM2.5."""

from __future__ import annotations

from typing import Any

from xtuner.model.transformers_models.hub_config import HubConfig


class InternLM2Config(HubConfig):
    """Settings of an InternLM2 model, under the names of the hub's ``config.json``.

    The rotary embedding's ``rope_theta`` and ``rope_scaling`` (None, or a ``type`` of ``linear`` or
    ``dynamic`` and a ``factor``) are kept as ``rope_parameters``.
    """

    model_type = "internlm2"
    keys_to_ignore_at_inference = ["past_key_values"]

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

    def __post_init__(self, **kwargs: object) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
