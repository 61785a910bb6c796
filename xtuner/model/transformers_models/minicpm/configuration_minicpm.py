"""The configuration of MiniCPM."""

from __future__ import annotations

from transformers.models.llama.configuration_llama import LlamaConfig

from xtuner.model.transformers_models.hub_config import HubConfig
from xtuner.model.transformers_models.unsupported import refuse_other


class MiniCPMConfig(HubConfig, LlamaConfig):
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

    tie_word_embeddings: bool = True
    scale_emb: float = 1
    dim_model_base: float = 1
    scale_depth: float = 1

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        refuse_other(self, num_experts=0, sparse_config=None)

    @property
    def logits_scaling(self) -> float:
        """What logits are divided by; Granite's name for it, which the loss reads."""
        return self.hidden_size / self.dim_model_base
