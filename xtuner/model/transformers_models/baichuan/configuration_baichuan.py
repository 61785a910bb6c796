"""The configuration of Baichuan and Baichuan2."""

from __future__ import annotations

from typing import Any

from xtuner.model.transformers_models.hub_config import HubConfig
from xtuner.model.transformers_models.unsupported import refuse_other

BAICHUAN2_VOCABULARY = 125696


class BaichuanConfig(HubConfig):
    """Settings of a Baichuan model, under the names of the hub's ``config.json``.

    One ``model_type`` stands for four architectures, which differ in two ways:

    * Models of 7B have rotary embeddings and a ``max_position_embeddings``; those of 13B have ALiBi
      and a ``model_max_length`` alone.
    * Baichuan2 normalises the rows of its output layer; its vocabulary (125,696) tells it from
      Baichuan (64,000), to vLLM as well.

    Args:
        norm_head: whether the rows of the output layer are normalised; None: as the vocabulary
            tells. It is not written where None.

    Raises:
        UserError: for the z-loss of the hub's code.
    """

    model_type = "baichuan"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 64000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int | None = None
    model_max_length: int | None = None
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    z_loss_weight: float = 0
    norm_head: bool | None = None

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        self.architectures = self.architectures or []  # transformers looks for the class in it
        refuse_other(self, z_loss_weight=0)

    @property
    def uses_alibi(self) -> bool:
        """Whether positions are told by ALiBi, not by rotary embeddings."""
        return self.max_position_embeddings is None

    @property
    def normalizes_head(self) -> bool:
        """Whether the rows of the output layer are normalised."""
        return self.vocab_size >= BAICHUAN2_VOCABULARY if self.norm_head is None else self.norm_head

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """As many as query heads."""
        return self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """Without what other code would read as set, or does not know."""
        fields = super().to_dict()
        optional = ("max_position_embeddings", "model_max_length", "norm_head")
        return {
            name: value
            for name, value in fields.items()
            if value is not None or name not in optional
        }
