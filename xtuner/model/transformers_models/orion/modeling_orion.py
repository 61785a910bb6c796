"""Orion: a Llama with LayerNorm in place of RMSNorm.

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
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from xtuner.model.transformers_models.decoder import (
    CausalLMModel,
    DecoderModel,
    DecoderPreTrainedModel,
)
from xtuner.model.transformers_models.orion.configuration_orion import OrionConfig
from xtuner.model.transformers_models.rotary import RotaryEmbedding


class OrionDecoderLayer(GradientCheckpointingLayer):
    """A layer of Llama with LayerNorms."""

    def __init__(self, config: OrionConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        """(B, S, H) to (B, S, H); keywords as ``LlamaAttention``'s."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class OrionPreTrainedModel(DecoderPreTrainedModel):
    """What Orion's models share."""

    config_class = OrionConfig
    _no_split_modules = ["OrionDecoderLayer"]
    _can_record_outputs = {"hidden_states": OrionDecoderLayer, "attentions": LlamaAttention}


class OrionModel(DecoderModel, OrionPreTrainedModel):
    """The body."""

    def __init__(self, config: OrionConfig) -> None:
        super().__init__(config)
        padding = config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding)
        self.rotary_emb = RotaryEmbedding(config)
        self.layers = nn.ModuleList(
            OrionDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()


class OrionForCausalLM(CausalLMModel, OrionPreTrainedModel, GenerationMixin):
    """The causal language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: OrionConfig) -> None:
        super().__init__(config)
        self.model = OrionModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class OrionForSequenceClassification(GenericForSequenceClassification, OrionPreTrainedModel):
    """The model with a ``score`` for each label, read at the last token."""
