"""Baichuan and Baichuan2: a Llama with one layer for query, key and value; 13B has ALiBi.

Names of modules and tensors are the hub's, so that its weights and adapters fit as they are.

Shapes: B batch, S tokens, H width of the model, N heads, D width of a head, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import linear
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from xtuner.model.transformers_models.baichuan.alibi import COLUMNS, eager_attention, with_alibi
from xtuner.model.transformers_models.baichuan.configuration_baichuan import BaichuanConfig
from xtuner.model.transformers_models.decoder import (
    CausalLMModel,
    DecoderModel,
    DecoderPreTrainedModel,
    attend,
    cos_and_sin,
    inverse_frequencies,
    split_heads,
)

ROPE_BASE = 10000.0


class NormHead(nn.Linear):
    """Baichuan2's output layer: logits are products with the rows of the weight, normalised."""

    def norms(self) -> Tensor:
        """(V, 1) lengths of the rows, in float32."""
        return vector_norm(self.weight, dim=1, keepdim=True, dtype=torch.float32).clamp(min=1e-12)

    def projection(self) -> Tensor:
        """(V, H) the normalised rows, which the loss of training takes."""
        return (self.weight / self.norms()).to(self.weight.dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., H) to (..., V)."""
        logits = linear(hidden_states, self.weight)
        return (logits / self.norms().squeeze(1)).to(logits.dtype)


class BaichuanMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, H) to (B, S, H)."""
        down: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down


class BaichuanAttention(nn.Module):
    """Causal attention; the rows of ``W_pack`` are queries, then keys, then values."""

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_key_value_groups = 1
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        width = config.hidden_size
        self.W_pack = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: (B, S, H).
            position_ids: (B, S).
            position_embeddings: cosines and sines, each (B, S, D), or None with ALiBi.
            attention_mask: as the attention function wants it.
            past_key_values: keys and values of earlier tokens; the new ones are added.
            **kwargs: for the attention function.

        Returns:
            (B, S, H), and the attention function's weights.
        """
        parts = self.W_pack(hidden_states).chunk(3, dim=-1)
        query, key, value = (split_heads(part, self.config.head_dim) for part in parts)
        if position_embeddings is not None:
            rotated = apply_rotary_pos_emb(query, key, *position_embeddings)
            query, key = (part.to(value.dtype) for part in rotated)
        positions = position_ids
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
            # distances are all that counts, so padding before the first token does not matter
            positions = torch.arange(key.shape[2], device=key.device)[None]
        if position_embeddings is None:
            query, key, value = with_alibi(query, key, value, positions, self.scaling)
            kwargs["eager"] = eager_attention
        kwargs["position_ids"] = position_ids
        output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        if position_embeddings is None:
            output = output.unflatten(-1, (query.shape[1], -1))[..., :-COLUMNS].flatten(2)
        return self.o_proj(output), weights


class BaichuanLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each with its norm before and its residual after."""

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = BaichuanAttention(config, layer_idx)
        self.mlp = BaichuanMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """(B, S, H) to (B, S, H); keywords as ``BaichuanAttention``'s."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        fed: Tensor = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + fed


class BaichuanPreTrainedModel(DecoderPreTrainedModel):
    """What Baichuan's models share."""

    config_class = BaichuanConfig
    _no_split_modules = ["BaichuanLayer"]
    _can_record_outputs = {"hidden_states": BaichuanLayer, "attentions": BaichuanAttention}


class BaichuanModel(DecoderModel, BaichuanPreTrainedModel):
    """The body."""

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        padding = config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding)
        self.layers = nn.ModuleList(
            BaichuanLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    @torch.no_grad()
    def position_embeddings(
        self, hidden_states: Tensor, position_ids: Tensor, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of rotary embeddings, in float32; None with ALiBi."""
        if self.config.uses_alibi:
            return None
        width, device = self.config.head_dim, hidden_states.device
        return cos_and_sin(position_ids, inverse_frequencies(width, ROPE_BASE, device))


class BaichuanForCausalLM(CausalLMModel, BaichuanPreTrainedModel, GenerationMixin):
    """The causal language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.model = BaichuanModel(config)
        head = NormHead if config.normalizes_head else nn.Linear
        self.lm_head = head(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Take the weight of a resized layer, which transformers makes a plain one."""
        if not self.config.normalizes_head or isinstance(new_embeddings, NormHead):
            self.lm_head = new_embeddings
            return
        shape = new_embeddings.in_features, new_embeddings.out_features
        self.lm_head = NormHead(*shape, bias=False, device="meta")
        self.lm_head.weight = new_embeddings.weight


class BaiChuanForCausalLM(BaichuanForCausalLM):
    """The same, as the folder of Baichuan-7B names it."""
