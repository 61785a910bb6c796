"""The configuration of Yi, first version."""

from __future__ import annotations

from typing import Any

from transformers.models.llama.configuration_llama import LlamaConfig

from xtuner.model.transformers_models.hub_config import HubConfig


class YiConfig(HubConfig, LlamaConfig):
    """Settings of a Yi model, under the names of the hub's ``config.json``.

    Later folders of Yi say ``model_type`` ``llama``, and are transformers' Llama.
    """

    model_type = "Yi"
    keys_to_ignore_at_inference = ["past_key_values"]
    default_theta = 5_000_000.0

    vocab_size: int = 64000
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.rope_parameters is None:
            kwargs.setdefault("rope_theta", self.default_theta)
        super().__post_init__(**kwargs)
