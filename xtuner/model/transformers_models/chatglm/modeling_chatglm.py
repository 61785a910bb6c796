"""ChatGLM2 and ChatGLM3: rotary embeddings on half of each head, few key heads, SwiGLU.

Names of modules and tensors are the hub's, so that its weights and adapters fit as they are.

Shapes: B batch, S tokens, H width of the model, N heads, K key heads, D width of a head.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, silu
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb

from xtuner.model.transformers_models.chatglm.configuration_chatglm import ChatGLMConfig
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


class ChatGLMRMSNorm(nn.Module):
    """Root mean square norm; multiplied by the weight before it is rounded to the input's type."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., H) to (..., H)."""
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * wide).to(hidden_states.dtype)


def make_norm(config: ChatGLMConfig) -> nn.Module:
    """The norm that ``rmsnorm`` chooses."""
    norm = ChatGLMRMSNorm if config.rmsnorm else nn.LayerNorm
    return norm(config.hidden_size, eps=config.layernorm_epsilon)


class ChatGLMRotaryEmbedding(nn.Module):
    """Angles for the first half of each head.

    ``inv_freq`` is in the hub's checkpoints, rounded to 16 bits; it is kept for them alone.
    """

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.width = config.kv_channels // 2
        self.base = ROPE_BASE * config.rope_ratio
        frequencies = self.frequencies(torch.device("cpu"))
        self.register_buffer("inv_freq", frequencies.to(torch.get_default_dtype()))

    def frequencies(self, device: torch.device) -> Tensor:
        """(D / 4,) in float32."""
        return inverse_frequencies(self.width, self.base, device)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of (B, S) positions, each (B, S, D / 2), in the format of ``x``."""
        cos, sin = cos_and_sin(position_ids, self.frequencies(x.device))
        return cos.to(x.dtype), sin.to(x.dtype)


class SelfAttention(nn.Module):
    """Causal attention; the rows of ``query_key_value`` are queries, then keys, then values.

    Without ``multi_query_attention`` they are ordered by head: query, key, value of each.
    """

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.kv_channels
        self.widths = [config.num_attention_heads * self.head_dim] + 2 * [
            config.multi_query_group_num * self.head_dim
        ]
        self.num_key_value_groups = config.num_attention_heads // config.multi_query_group_num
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        bias = config.add_bias_linear
        self.query_key_value = nn.Linear(
            config.hidden_size, sum(self.widths), bias=bias or config.add_qkv_bias
        )
        self.dense = nn.Linear(self.widths[0], config.hidden_size, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, H) to (B, S, H), and the attention function's weights."""
        fused = self.query_key_value(hidden_states)
        if self.config.multi_query_attention:
            parts = fused.split(self.widths, dim=-1)
            query, key, value = (split_heads(part, self.head_dim) for part in parts)
        else:
            query, key, value = split_heads(fused, 3 * self.head_dim).chunk(3, dim=-1)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        rate = self.config.attention_dropout
        output, weights = attend(self, query, key, value, attention_mask, dropout=rate, **kwargs)
        return self.dense(output), weights


class MLP(nn.Module):
    """SwiGLU; ``dense_h_to_4h`` gives the gate, then what is gated."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        bias = config.add_bias_linear
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=bias)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, H) to (B, S, H)."""
        gate, up = self.dense_h_to_4h(hidden_states).chunk(2, dim=-1)
        return cast(Tensor, self.dense_4h_to_h(silu(gate) * up))


class GLMBlock(GradientCheckpointingLayer):
    """Attention and feed-forward, each with its norm before and its residual after."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.after_norm = config.apply_residual_connection_post_layernorm
        self.rate = config.hidden_dropout
        self.input_layernorm = make_norm(config)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """(B, S, H) to (B, S, H); keywords as ``SelfAttention``'s."""
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attention(normed, **kwargs)
        hidden_states = self.add(hidden_states, normed, attended)
        normed = self.post_attention_layernorm(hidden_states)
        return self.add(hidden_states, normed, self.mlp(normed))

    def add(self, hidden_states: Tensor, normed: Tensor, output: Tensor) -> Tensor:
        """The residual connection, from before or after the norm."""
        residual = normed if self.after_norm else hidden_states
        return residual + dropout(output, self.rate, self.training)


class GLMTransformer(nn.Module):
    """The layers and the norm after them."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GLMBlock(config, index) for index in range(config.num_layers))
        if config.post_layer_norm:
            self.final_layernorm = make_norm(config)


class Embedding(nn.Module):
    """The embedding of tokens, under the hub's name."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class ChatGLMPreTrainedModel(DecoderPreTrainedModel):
    """What ChatGLM's models share."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["GLMBlock"]
    _can_record_outputs = {"hidden_states": GLMBlock, "attentions": SelfAttention}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ChatGLMRotaryEmbedding):
            buffer = cast(Tensor, module.inv_freq)
            init.copy_(buffer, module.frequencies(torch.device("cpu")))


class ChatGLMModel(DecoderModel, ChatGLMPreTrainedModel):
    """The body; it holds the output layer as well, which ``forward`` leaves alone."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.rotary_pos_emb = ChatGLMRotaryEmbedding(config)
        self.encoder = GLMTransformer(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    @property
    def decoder_layers(self) -> nn.ModuleList:
        return self.encoder.layers

    @property
    def final_norm(self) -> nn.Module:
        return getattr(self.encoder, "final_layernorm", nn.Identity())

    def position_embeddings(
        self, hidden_states: Tensor, position_ids: Tensor, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor]:
        return self.rotary_pos_emb(hidden_states, position_ids)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding.word_embeddings = cast(nn.Embedding, value)


class ChatGLMForConditionalGeneration(CausalLMModel, ChatGLMPreTrainedModel, GenerationMixin):
    """The causal language model, under the name that the hub gave it."""

    _tied_weights_keys = {
        "transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"
    }

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.transformer.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.transformer.output_layer = new_embeddings
