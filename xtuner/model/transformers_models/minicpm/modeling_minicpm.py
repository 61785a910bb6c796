"""MiniCPM: a Llama whose embeddings, residuals and logits are scaled by its size (muP).

Names of modules and tensors are the hub's, so that its weights and adapters fit as they are.

Shapes: B batch, S tokens, H width of the model, V vocabulary.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from xtuner.model.transformers_models.decoder import (
    CausalLMModel,
    DecoderModel,
    DecoderPreTrainedModel,
)
from xtuner.model.transformers_models.minicpm.configuration_minicpm import MiniCPMConfig
from xtuner.model.transformers_models.rotary import RotaryEmbedding


class MiniCPMDecoderLayer(GradientCheckpointingLayer):
    """A layer of Llama; what it adds is scaled."""

    def __init__(self, config: MiniCPMConfig, layer_idx: int) -> None:
        super().__init__()
        self.scale = config.scale_depth / math.sqrt(config.num_hidden_layers)
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        """(B, S, H) to (B, S, H); keywords as ``LlamaAttention``'s."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended * self.scale
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)) * self.scale


class MiniCPMPreTrainedModel(DecoderPreTrainedModel):
    """What MiniCPM's models share."""

    config_class = MiniCPMConfig
    _no_split_modules = ["MiniCPMDecoderLayer"]
    _can_record_outputs = {"hidden_states": MiniCPMDecoderLayer, "attentions": LlamaAttention}


class MiniCPMModel(DecoderModel, MiniCPMPreTrainedModel):
    """The body."""

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__(config)
        padding = config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding)
        self.rotary_emb = RotaryEmbedding(config)
        self.layers = nn.ModuleList(
            MiniCPMDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def embed(self, input_ids: Tensor) -> Tensor:
        return super().embed(input_ids) * self.config.scale_emb


class MiniCPMForCausalLM(CausalLMModel, MiniCPMPreTrainedModel, GenerationMixin):
    """The causal language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__(config)
        self.model = MiniCPMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def logits(self, hidden_states: Tensor) -> Tensor:
        return super().logits(hidden_states / self.config.logits_scaling)
