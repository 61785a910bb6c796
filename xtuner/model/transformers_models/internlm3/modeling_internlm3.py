"""InternLM3: a Llama with few key heads, whose rotary embedding is scaled by NTK.

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

from xtuner.model.transformers_models.internlm3.configuration_internlm3 import InternLM3Config
from xtuner.model.transformers_models.rotary import RotaryEmbedding


class InternLM3PreTrainedModel(LlamaPreTrainedModel):
    """What the models below share."""

    config_class = InternLM3Config


class InternLM3Model(InternLM3PreTrainedModel, LlamaModel):
    """The layers, without a head."""

    def __init__(self, config: InternLM3Config) -> None:
        super().__init__(config)  # type: ignore[arg-type]
        self.rotary_emb: nn.Module = RotaryEmbedding(config)  # type: ignore[assignment]


class InternLM3ForCausalLM(InternLM3PreTrainedModel, LlamaForCausalLM):
    """The model with its head ``lm_head``."""

    def __init__(self, config: InternLM3Config) -> None:
        super().__init__(config)  # type: ignore[arg-type]
        self.model: nn.Module = InternLM3Model(config)
        self.post_init()


class InternLM3ForSequenceClassification(
    GenericForSequenceClassification, InternLM3PreTrainedModel
):
    """The model with a ``score`` for each label, read at the last token."""
