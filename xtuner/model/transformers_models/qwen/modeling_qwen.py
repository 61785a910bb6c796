"""Qwen of 2023: a Llama with biases in the fused query, key and value, and its own long rows.

Rows longer than those of pretraining are scaled in evaluation, not in training: queries by the
logarithm of their position (Su, 2021), rotary embeddings by a larger base that depends on the
length (dynamic NTK-aware scaling). Both are computed sample by sample in packed rows.

Names of modules and tensors are the hub's, so that its weights and adapters fit as they are.

Shapes: B batch, S tokens, H width of the model, N heads, D width of a head.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from xtuner.model.transformers_models.decoder import (
    CausalLMModel,
    DecoderModel,
    DecoderPreTrainedModel,
    attend,
    cos_and_sin,
    inverse_frequencies,
    split_heads,
)
from xtuner.model.transformers_models.qwen.configuration_qwen import QWenConfig
from xtuner.model.transformers_models.rotary import sample_lengths

Positions = tuple[Tensor, Tensor, Tensor | None]
"""Cosines, sines, and factors of queries; these are None where all are 1."""


class QWenRotaryEmbedding(nn.Module):
    """Angles of rotary embeddings, of a larger base for long samples in evaluation.

    ``rope_type`` says that they depend on the length of the row.
    """

    rope_type = "dynamic"

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        self.width, self.base = config.head_dim, float(config.rotary_emb_base)
        self.trained, self.dynamic = config.seq_length, config.use_dynamic_ntk

    def ntk_alpha(self, position_ids: Tensor) -> Tensor | None:
        """(B, S, 1) factors for samples longer than the trained length; None where there is none.

        They are 1 up to the trained length, 3 up to its double, 7 up to its fourfold, ...
        """
        if self.training or not self.dynamic or int(position_ids.max()) < self.trained:
            return None
        doublings = torch.log2(sample_lengths(position_ids).double() / self.trained)
        return (2 ** (doublings.ceil() + 1) - 1).clamp(min=1)[..., None].float()

    @torch.no_grad()
    def forward(
        self, x: Tensor, position_ids: Tensor, alpha: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines in float32.

        Args:
            x: anything; not used.
            position_ids: (B, S), each sample's from 0 on.
            alpha: (B, 1, 1), in place of what the lengths give.

        Returns:
            Each (B, S, D).
        """
        alpha = self.ntk_alpha(position_ids) if alpha is None else alpha
        base: float | Tensor = self.base
        if alpha is not None:
            base = base * alpha ** (self.width / (self.width - 2))
        return cos_and_sin(position_ids, inverse_frequencies(self.width, base, x.device))


class QWenAttention(nn.Module):
    """Causal attention; the rows of ``c_attn`` are queries, then keys, then values."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        width = config.hidden_size
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width, bias=not config.no_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Positions,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, H) to (B, S, H), and the attention function's weights."""
        parts = self.c_attn(hidden_states).chunk(3, dim=-1)
        query, key, value = (split_heads(part, self.head_dim) for part in parts)
        cos, sin, factors = position_embeddings
        query, key = (part.to(value.dtype) for part in apply_rotary_pos_emb(query, key, cos, sin))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if factors is not None:
            query = query * factors.to(query.dtype)
        rate = self.config.attn_dropout_prob
        output, weights = attend(self, query, key, value, attention_mask, dropout=rate, **kwargs)
        return self.c_proj(output), weights


class QWenMLP(nn.Module):
    """``c_proj(w1(x) * silu(w2(x)))``; its layers have transformers' usual names as well."""

    gate_proj = property(lambda self: self.w2)
    up_proj = property(lambda self: self.w1)
    down_proj = property(lambda self: self.c_proj)

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        width, bias = config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(config.hidden_size, width, bias=bias)
        self.w2 = nn.Linear(config.hidden_size, width, bias=bias)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.act_fn = silu

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, H) to (B, S, H)."""
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        return cast(Tensor, self.down_proj(self.act_fn(gate) * up))


class QWenBlock(GradientCheckpointingLayer):
    """Attention and feed-forward, each with its norm before and its residual after."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = LlamaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = LlamaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """(B, S, H) to (B, S, H); keywords as ``QWenAttention``'s."""
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), **kwargs)[0]
        return hidden_states + cast(Tensor, self.mlp(self.ln_2(hidden_states)))


class QWenPreTrainedModel(DecoderPreTrainedModel):
    """What Qwen's models share."""

    config_class = QWenConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    _no_split_modules = ["QWenBlock"]
    _keys_to_ignore_on_load_unexpected = [r"attn\.masked_bias", r"rotary_emb\.inv_freq"]
    _can_record_outputs = {"hidden_states": QWenBlock, "attentions": QWenAttention}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (QWenAttention, QWenMLP)):  # as GPT-2: by the number of residuals
            layers = self.config.num_hidden_layers
            std = self.config.initializer_range / math.sqrt(2 * layers)
            init.normal_(module.c_proj.weight, mean=0.0, std=std)


class QWenModel(DecoderModel, QWenPreTrainedModel):
    """The body."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.rotary_emb = QWenRotaryEmbedding(config)
        self.h = nn.ModuleList(
            QWenBlock(config, index) for index in range(config.num_hidden_layers)
        )
        self.ln_f = LlamaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.post_init()

    @property
    def decoder_layers(self) -> nn.ModuleList:
        return self.h

    @property
    def final_norm(self) -> nn.Module:
        return self.ln_f

    def embed(self, input_ids: Tensor) -> Tensor:
        return cast(Tensor, self.drop(self.wte(input_ids)))

    def default_position_ids(self, hidden_states: Tensor, past: int, mask: Tensor | None) -> Tensor:
        """Positions from each row's first token on: here they count, not just their distances."""
        if isinstance(mask, Tensor) and mask.ndim == 2:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            return positions[:, -hidden_states.shape[1] :]
        return super().default_position_ids(hidden_states, past, mask)

    def position_embeddings(
        self, hidden_states: Tensor, position_ids: Tensor, past_key_values: Cache | None
    ) -> Positions:
        """A cache keeps the scaling of its first tokens: its keys have been rotated by it."""
        alpha = getattr(past_key_values, "ntk_alpha", None)
        if past_key_values is not None and past_key_values.get_seq_length() == 0:
            of_tokens = self.rotary_emb.ntk_alpha(position_ids)
            alpha = torch.ones(1, 1, 1) if of_tokens is None else of_tokens[:, -1:]
            alpha = alpha.to(hidden_states.device)
            past_key_values.ntk_alpha = alpha  # type: ignore[attr-defined]
        cos, sin = self.rotary_emb(hidden_states, position_ids=position_ids, alpha=alpha)
        return cos, sin, self.query_factors(position_ids)

    def query_factors(self, position_ids: Tensor) -> Tensor | None:
        """(B, 1, S, 1) logarithms of the positions to the base of the trained length, from 1 on."""
        length = self.config.seq_length
        if self.training or not self.config.use_logn_attn or int(position_ids.max()) < length:
            return None
        factors = torch.log(position_ids.double() + 1) / math.log(length)
        return factors.clamp(min=1.0).float()[:, None, :, None]


class QWenLMHeadModel(CausalLMModel, QWenPreTrainedModel, GenerationMixin):
    """The causal language model."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers tells it by the name of the class
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
