"""InternLM: Llama with biases in its attention, and a rotary embedding that may be scaled.

Layers, and names of modules and tensors, are those of transformers' Llama.
"""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)

from xtuner.model.transformers_models.internlm.configuration_internlm import InternLMConfig
from xtuner.model.transformers_models.rotary import RotaryEmbedding


class InternLMPreTrainedModel(LlamaPreTrainedModel):
    """What the models below share."""

    config_class = InternLMConfig
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]


class InternLMModel(InternLMPreTrainedModel, LlamaModel):
    """The layers, without a head."""

    def __init__(self, config: InternLMConfig) -> None:
        super().__init__(config)  # type: ignore[arg-type]
        self.rotary_emb: nn.Module = RotaryEmbedding(config)  # type: ignore[assignment]


class InternLMForCausalLM(InternLMPreTrainedModel, LlamaForCausalLM):
    """The model with its head ``lm_head``."""

    def __init__(self, config: InternLMConfig) -> None:
        super().__init__(config)  # type: ignore[arg-type]
        self.model: nn.Module = InternLMModel(config)
        self.post_init()


class InternLMForSequenceClassification(GenericForSequenceClassification, InternLMPreTrainedModel):
    """The model with a ``score`` for each label, read at the last token."""
