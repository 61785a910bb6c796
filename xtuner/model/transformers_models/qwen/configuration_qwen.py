"""The configuration of the first generation of Qwen."""

from __future__ import annotations

from xtuner.model.transformers_models.hub_config import HubConfig
from xtuner.model.transformers_models.unsupported import refuse_other


class QWenConfig(HubConfig):
    """Settings of a Qwen model, under the names of the hub's ``config.json``.

    ``seq_length`` is the length of the rows of pretraining. Longer ones are scaled in evaluation:
    their queries by ``use_logn_attn``, their rotary embeddings by ``use_dynamic_ntk``.

    ``bf16``, ``fp16`` and ``fp32`` choose the number format in the hub's code; here ``dtype`` does.
    They are kept and not read, as are the settings of flash attention and of the quantised cache.

    Raises:
        UserError: for rotary embeddings on a part of each head.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    emb_dropout_prob: float = 0.0
    attn_dropout_prob: float = 0.0
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 8192
    seq_length: int = 8192
    kv_channels: int = 128
    rotary_emb_base: float = 10000
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    no_bias: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        refuse_other(self, rotary_pct=1.0)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """As many as query heads."""
        return self.num_attention_heads
