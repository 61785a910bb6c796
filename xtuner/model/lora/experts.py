"""Mixtures of experts: adapters and 4 bits for a layer's experts, which are one tensor.

With ``load_in_4bit`` transformers quantises linear layers only. The experts of a mixture are most
of its weights (Mixtral 8x7B: 90 of 93 GB), so they are quantised here, by bitsandbytes' own
parametrization. peft cannot put an adapter on a quantised tensor: where it has to, the tensor
stays as it is, and the user is told what that costs.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import nn

from xtuner.model.lora.targets import adapts_experts
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def disable_expert_lora_dropout(lora: LoraConfig, llm: PreTrainedModel) -> None:
    """Set ``lora_dropout`` to 0 where an adapter sits on expert tensors: peft has none for them.

    Args:
        lora: changed in place; a warning says so.
        llm: the model that gets the adapter.
    """
    if getattr(lora, "lora_dropout", 0) and adapts_experts(lora, llm):
        text = tr("lora_dropout=%s is set to 0: experts cannot have it.")
        logger.warning(text, lora.lora_dropout)
        lora.lora_dropout = 0.0


def quantize_experts(llm: PreTrainedModel, quantization: object) -> None:
    """Quantise the expert tensors that no adapter is on.

    Args:
        llm: a transformers model, in its adapter if it has one; changed in place.
        quantization: its ``BitsAndBytesConfig``, or None: nothing is done then.
    """
    if not getattr(quantization, "load_in_4bit", False):
        return
    left = 0
    for module, name in expert_tensors(llm):
        if has_adapter(llm, module):
            tensor = getattr(module, name)
            left += tensor.numel() * tensor.element_size()
        else:
            _quantize(module, name, quantization)
    if left:
        logger.warning(
            tr(
                "The experts stay in 16 bits (%.1f GB) because adapters are on them; without w1, "
                "w2, w3, gate_up_proj and down_proj in target_modules they are kept in 4 bits."
            ),
            left / 1e9,
        )


def expert_tensors(llm: nn.Module) -> list[tuple[nn.Module, str]]:
    """Find (module, name) of the parameters (experts, out, in) that hold the experts of a layer."""
    return [
        (module, name)
        for module in llm.modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3 and weight.is_floating_point() and "Expert" in type(module).__name__
    ]


def has_adapter(llm: nn.Module, module: nn.Module) -> bool:
    """Whether an adapter is on a module of a model."""
    return any(getattr(outer, "base_layer", None) is module for outer in llm.modules())


def _quantize(module: nn.Module, name: str, quantization: Any) -> None:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    replace_parameter_4bit(
        module,
        name,
        compress_statistics=quantization.bnb_4bit_use_double_quant,
        quant_type=quantization.bnb_4bit_quant_type,
    )
