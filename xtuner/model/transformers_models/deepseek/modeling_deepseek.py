"""DeepSeekMoE 16B: a Llama whose feed-forward is many small experts and some that all tokens share.

Names of modules and tensors are the hub's, so that its weights and adapters fit as they are; each
expert is three linear layers of its own.

Shapes: B batch, S tokens, H width of the model, T = B * S, E experts, k of them for a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from xtuner.model.transformers_models.decoder import (
    CausalLMModel,
    DecoderModel,
    DecoderPreTrainedModel,
)
from xtuner.model.transformers_models.deepseek.configuration_deepseek import DeepseekConfig
from xtuner.model.transformers_models.rotary import RotaryEmbedding


class DeepseekMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: DeepseekConfig, intermediate_size: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.gate_proj = nn.Linear(width, intermediate_size, bias=False)
        self.up_proj = nn.Linear(width, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, width, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) to (..., H)."""
        return cast(Tensor, self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class MoEGate(nn.Module):
    """Scores the experts for each token and chooses the k best."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.top_k = cast(int, config.num_experts_per_tok)
        self.normalized = config.norm_topk_prob and self.top_k > 1
        self.weight = nn.Parameter(
            torch.empty(cast(int, config.n_routed_experts), config.hidden_size)
        )

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose.

        Args:
            hidden_states: (T, H).

        Returns:
            Logits (T, E), weights of the chosen experts (T, k), their numbers (T, k).
        """
        logits = linear(hidden_states, self.weight)
        weights, chosen = logits.softmax(-1).topk(self.top_k, dim=-1, sorted=False)
        if self.normalized:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights, chosen


class DeepseekMoE(nn.Module):
    """Routed experts, and shared ones."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        width = config.moe_intermediate_size
        self.experts = nn.ModuleList(
            DeepseekMLP(config, width) for _ in range(cast(int, config.n_routed_experts))
        )
        self.gate = MoEGate(config)
        if config.n_shared_experts:
            self.shared_experts = DeepseekMLP(config, width * config.n_shared_experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, H) to (B, S, H)."""
        tokens = hidden_states.flatten(0, 1)
        _, weights, chosen = self.gate(tokens)
        output = self.routed(tokens, weights, chosen).view_as(hidden_states)
        if hasattr(self, "shared_experts"):
            output = output + self.shared_experts(hidden_states)
        return output

    def routed(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The weighted sum of each token's experts, (T, H).

        Experts without a token are called as well while training, so that their weights get a
        gradient of zeros, and with several processes: those that gather weights (ZeRO-3) all
        have to do so, in validation as well.
        """
        calls_all = torch.is_grad_enabled() or dist.is_initialized()
        experts = len(self.experts)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=experts).tolist()
        places = (order // chosen.shape[1]).split(counts)
        factors = weights.flatten()[order].split(counts)
        output = torch.zeros_like(tokens)
        for expert, place, factor in zip(self.experts, places, factors, strict=True):
            if calls_all or len(place):
                found = expert(tokens[place]) * factor[:, None]
                output.index_add_(0, place, found.to(output.dtype))
        return output


class DeepseekDecoderLayer(GradientCheckpointingLayer):
    """A layer of Llama; its feed-forward is a mixture of experts, or not."""

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        if config.has_experts(layer_idx):
            self.mlp: nn.Module = DeepseekMoE(config)
        else:
            self.mlp = DeepseekMLP(config, config.intermediate_size)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """(B, S, H) to (B, S, H); keywords as ``LlamaAttention``'s."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + cast(Tensor, self.mlp(self.post_attention_layernorm(hidden_states)))


class DeepseekPreTrainedModel(DecoderPreTrainedModel):
    """What DeepSeekMoE's models share."""

    config_class = DeepseekConfig
    _no_split_modules = ["DeepseekDecoderLayer"]
    _can_record_outputs = {
        "hidden_states": DeepseekDecoderLayer,
        "attentions": LlamaAttention,
        "router_logits": OutputRecorder(MoEGate, index=0),
    }

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoEGate):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


class DeepseekModel(DecoderModel, DeepseekPreTrainedModel):
    """The body."""

    output_class = MoeModelOutputWithPast

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        padding = config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding)
        self.rotary_emb = RotaryEmbedding(config)
        self.layers = nn.ModuleList(
            DeepseekDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()


class DeepseekForCausalLM(CausalLMModel, DeepseekPreTrainedModel, GenerationMixin):
    """The causal language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.model = DeepseekModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.aux_loss_alpha
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As ``CausalLMModel``, with the router's balance loss.

        Args:
            input_ids: (B, S) token ids.
            labels: (B, S) token ids, -100 where a token is not trained.
            logits_to_keep: only for so many of the last positions, or for these; 0: for all.
            output_router_logits: give the router's logits and its loss, and add that, weighted, to
                the loss; as ``config.output_router_logits`` if None.
            **kwargs: as ``DecoderModel``'s.
        """
        routes = self.config.output_router_logits
        routes = routes if output_router_logits is None else output_router_logits
        outputs = self.model(input_ids=input_ids, output_router_logits=routes, **kwargs)
        logits = self.logits(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = balance = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        if routes:
            samples = sample_of_token(
                outputs.last_hidden_state, kwargs.get("attention_mask"), kwargs.get("cu_seq_lens_q")
            )
            balance = balance_loss(outputs.router_logits, samples, self.config)
            loss = None if loss is None else loss + self.router_aux_loss_coef * balance
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=balance,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def sample_of_token(
    hidden_states: Tensor, attention_mask: Tensor | None, cu_seq_lens: Tensor | None
) -> Tensor:
    """(T,) which sample each token belongs to, from 0 on; -1 at padding.

    Args:
        hidden_states: (B, S, H).
        attention_mask: (B, S), 0 at padding.
        cu_seq_lens: (samples + 1,) cumulative lengths of the samples of a packed row.
    """
    rows, length = hidden_states.shape[:2]
    device = hidden_states.device
    if cu_seq_lens is not None:
        return torch.searchsorted(cu_seq_lens, torch.arange(length, device=device), right=True) - 1
    samples = torch.arange(rows, device=device)[:, None].expand(rows, length)
    if attention_mask is not None:
        samples = samples.masked_fill(attention_mask[:, -length:] == 0, -1)
    return samples.flatten()


def balance_loss(
    router_logits: Sequence[Tensor], samples: Tensor, config: DeepseekConfig
) -> Tensor:
    """The expert-level balance loss of DeepSeekMoE (section 3.3), summed over layers.

    It is the mean over samples where ``seq_aux`` is set, else that of all tokens as one sample.

    Args:
        router_logits: (T, E) of each layer with experts.
        samples: (T,) the sample of each token; -1 for tokens that do not count.
        config: the model's.
    """
    counted = samples >= 0
    samples = samples[counted] if config.seq_aux else torch.zeros_like(samples[counted])
    sizes = samples.bincount()
    top_k = cast(int, config.num_experts_per_tok)
    total = router_logits[0].new_zeros((), dtype=torch.float32)
    for logits in router_logits:
        scores = logits[counted].float().softmax(-1)
        used = one_hot(scores.topk(top_k, dim=-1).indices, scores.shape[-1]).sum(1).float()
        sums = [value.new_zeros(len(sizes), value.shape[-1]) for value in (scores, used)]
        score, use = (
            zeros.index_add(0, samples, value)[sizes > 0] / sizes[sizes > 0, None]
            for zeros, value in zip(sums, (scores, used), strict=True)
        )
        total = total + (score * use).sum(-1).mean() * scores.shape[-1] / top_k
    return total
