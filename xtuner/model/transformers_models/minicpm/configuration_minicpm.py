"""The configuration of MiniCPM."""

from __future__ import annotations

from typing import Any

from xtuner.model.transformers_models.hub_config import HubConfig
from xtuner.model.transformers_models.unsupported import refuse_other


class MiniCPMConfig(HubConfig):
    """Settings of a MiniCPM model, under the names of the hub's ``config.json``.

    Args:
        scale_emb: factor on the embeddings.
        scale_depth: what each layer adds is multiplied by this over the root of their number.
        dim_model_base: logits are divided by ``hidden_size`` over this.

    Raises:
        UserError: for mixtures of experts and for sparse attention, which the hub has under the
            same ``model_type``.
    """

    model_type = "minicpm"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
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
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pretraining_tp: int = 1
    tie_word_embeddings: bool = True
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    scale_emb: float = 1
    dim_model_base: float = 1
    scale_depth: float = 1
    num_experts: int = 0
    sparse_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        refuse_other(self, num_experts=0, sparse_config=None)

    @property
    def logits_scaling(self) -> float:
        """What logits are divided by; Granite's name for it, which the loss reads."""
        return self.hidden_size / self.dim_model_base
