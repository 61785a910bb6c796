"""InternLM2 and InternLM2.5: a Llama whose query, key and value come from one layer, by groups.

Names of modules and tensors are the hub's, so that its weights and adapters fit as they are.

Shapes: B batch, S tokens, H width of the model, D width of a head, K key heads, G query heads of
each key head, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.utils.generic import can_return_tuple

from xtuner.model.transformers_models.decoder import (
    CausalLMModel,
    DecoderModel,
    DecoderPreTrainedModel,
    attend,
)
from xtuner.model.transformers_models.internlm2.configuration_internlm2 import InternLM2Config
from xtuner.model.transformers_models.rotary import RotaryEmbedding


class InternLM2MLP(nn.Module):
    """``w2(act(w1(x)) * w3(x))``; its layers have transformers' usual names as well."""

    gate_proj = property(lambda self: self.w1)
    up_proj = property(lambda self: self.w3)
    down_proj = property(lambda self: self.w2)

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, H) to (B, S, H)."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class InternLM2Attention(nn.Module):
    """Causal attention with grouped query heads.

    The rows of ``wqkv`` are ordered by key head: for each the D rows of its G queries, those of its
    key, and those of its value.
    """

    def __init__(self, config: InternLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads = config.num_attention_heads
        self.key_heads = config.num_key_value_heads or heads
        self.head_dim = config.hidden_size // heads
        self.num_key_value_groups = heads // self.key_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        width = (heads + 2 * self.key_heads) * self.head_dim
        self.wqkv = nn.Linear(config.hidden_size, width, bias=config.bias)
        self.wo = nn.Linear(heads * self.head_dim, config.hidden_size, bias=config.bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: (B, S, H).
            position_embeddings: cosines and sines, each (B, S, D).
            attention_mask: as the attention function wants it.
            past_key_values: keys and values of earlier tokens; the new ones are added.
            **kwargs: for the attention function.

        Returns:
            (B, S, H), and the attention function's weights.
        """
        rows = hidden_states.shape[:-1]
        groups = self.num_key_value_groups
        fused = self.wqkv(hidden_states).view(*rows, self.key_heads, groups + 2, self.head_dim)
        query = fused[..., :groups, :].flatten(-3, -2).transpose(1, 2)
        key, value = (fused[..., place, :].transpose(1, 2) for place in (-2, -1))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return self.wo(output), weights


class InternLM2DecoderLayer(GradientCheckpointingLayer):
    """Attention and gated layer, each after a norm and added to its input."""

    def __init__(self, config: InternLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.attention = InternLM2Attention(config, layer_idx)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        """(B, S, H) to (B, S, H); keywords are those of the attention."""
        attended, _ = self.attention(self.attention_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.feed_forward(self.ffn_norm(hidden_states))


class InternLM2PreTrainedModel(DecoderPreTrainedModel):
    """What the models below share."""

    config_class = InternLM2Config
    _input_embed_layer = "tok_embeddings"
    _no_split_modules = ["InternLM2DecoderLayer"]
    _can_record_outputs = {
        "hidden_states": InternLM2DecoderLayer,
        "attentions": InternLM2Attention,
    }


class InternLM2Model(DecoderModel, InternLM2PreTrainedModel):
    """The layers, without a head."""

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, config.pad_token_id
        )
        self.layers = nn.ModuleList(
            InternLM2DecoderLayer(config, number) for number in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.post_init()


class InternLM2ForCausalLM(CausalLMModel, InternLM2PreTrainedModel, GenerationMixin):
    """The model with its head ``output``."""

    _tied_weights_keys = {"output.weight": "model.tok_embeddings.weight"}

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.vocab_size = config.vocab_size
        self.output: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.output = new_embeddings


class InternLM2ForSequenceClassification(
    GenericForSequenceClassification, InternLM2PreTrainedModel
):
    """The model with a ``score`` for each label, read at the last token."""


class InternLM2ForRewardModel(InternLM2PreTrainedModel):
    """A reward for an answer that ends in ``config.reward_token_id``."""

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.v_head: nn.Module = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.v_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.v_head = new_embeddings

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: object
    ) -> SequenceClassifierOutputWithPast:
        """Compute rewards (B, 1), each at the last reward token of its row.

        Where the configuration names no reward token, the last token counts.

        Raises:
            ValueError: when a row has no reward token.
        """
        places = self._places(input_ids, attention_mask)
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        rewards = self.v_head(outputs.last_hidden_state)
        return SequenceClassifierOutputWithPast(
            logits=rewards[torch.arange(len(places), device=places.device), places],
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _places(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B,): where each row's reward is read."""
        token = getattr(self.config, "reward_token_id", None)
        marks = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if token is not None:
            marks = torch.eq(input_ids, token)
        if not bool(marks.any(dim=1).all()):
            raise ValueError(f"a row lacks the reward token {token}")
        return input_ids.shape[1] - 1 - marks.flip(1).int().argmax(1)
