"""The configuration of DeepSeekMoE."""

from __future__ import annotations

from transformers.models.llama.configuration_llama import LlamaConfig

from xtuner.model.transformers_models.hub_config import HubConfig
from xtuner.model.transformers_models.unsupported import refuse_other


class DeepseekConfig(HubConfig, LlamaConfig):
    """Settings of a DeepSeekMoE model, under the names of the hub's ``config.json``.

    ``output_router_logits`` adds the router's balance loss, weighted by ``aux_loss_alpha``, to the
    loss of training. It is False, as for all of transformers' mixtures; the hub's code adds it
    whenever it trains.

    Raises:
        UserError: for scores of experts other than a softmax.
    """

    model_type = "deepseek"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 102400
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        refuse_other(self, scoring_func="softmax")

    def has_experts(self, layer_idx: int) -> bool:
        """Whether a layer is a mixture of experts."""
        first, step = self.first_k_dense_replace, self.moe_layer_freq
        return bool(self.n_routed_experts) and layer_idx >= first and layer_idx % step == 0
