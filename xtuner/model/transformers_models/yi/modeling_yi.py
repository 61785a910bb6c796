"""Yi as its first folders have it: a Llama whose norms are called ``ln1`` and ``ln2``.

Names of modules and tensors are the hub's, so that its weights and adapters fit as they are.

Shapes: B batch, S tokens, H width of the model.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GradientCheckpointingLayer,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from xtuner.model.transformers_models.decoder import (
    CausalLMModel,
    DecoderModel,
    DecoderPreTrainedModel,
)
from xtuner.model.transformers_models.rotary import RotaryEmbedding
from xtuner.model.transformers_models.yi.configuration_yi import YiConfig


class YiDecoderLayer(GradientCheckpointingLayer):
    """A layer of Llama."""

    def __init__(self, config: YiConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.ln1 = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ln2 = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        """(B, S, H) to (B, S, H); keywords as ``LlamaAttention``'s."""
        attended, _ = self.self_attn(self.ln1(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.ln2(hidden_states))


class YiPreTrainedModel(DecoderPreTrainedModel):
    """What Yi's models share."""

    config_class = YiConfig
    _no_split_modules = ["YiDecoderLayer"]
    _can_record_outputs = {"hidden_states": YiDecoderLayer, "attentions": LlamaAttention}


class YiModel(DecoderModel, YiPreTrainedModel):
    """The body."""

    def __init__(self, config: YiConfig) -> None:
        super().__init__(config)
        padding = config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding)
        self.rotary_emb = RotaryEmbedding(config)
        self.layers = nn.ModuleList(
            YiDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()


class YiForCausalLM(CausalLMModel, YiPreTrainedModel, GenerationMixin):
    """The causal language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: YiConfig) -> None:
        super().__init__(config)
        self.model = YiModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class YiForSequenceClassification(GenericForSequenceClassification, YiPreTrainedModel):
    """The model with a ``score`` for each label, read at the last token."""
