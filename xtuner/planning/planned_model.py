"""The model of a config for a plan: its class and its adapters, no weights, sizes of 4-bit ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from mmengine.config import ConfigDict
from torch import nn

from xtuner.model.meta_model import build_meta_model, make_model
from xtuner.planning import stand_ins
from xtuner.registry import BUILDER
from xtuner.utils.dtypes import torch_dtype
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

BLOCK_4BIT, BLOCK_OF_SCALES = 64, 256
"""Weights of a scale in bitsandbytes' 4 bits, and scales of a scale of scales."""

BASE_LAYER = ".base_layer"
"""What peft adds to the names of layers that have an adapter."""


@dataclass
class PlannedModel:
    """A model without weights.

    Attributes:
        model: an instance of the config's model class, on the meta device.
        quantized: bytes of the weights that the run keeps in 4 or 8 bits, by their ``id``; here
            they have their original dtype.
    """

    model: nn.Module
    quantized: dict[int, int] = field(default_factory=dict)

    def size_of(self, weight: nn.Parameter) -> int:
        """Bytes of a weight as the run keeps it."""
        return self.quantized.get(id(weight), weight.numel() * weight.element_size())


def build_planned_model(settings: Mapping[str, Any]) -> PlannedModel:
    """Build a config's model: what ``from_pretrained`` would load is made from ``config.json``.

    Args:
        settings: the config's ``model``; imported names in it may be lazy.

    Raises:
        UserError: when there is no such model, or its folder is quantised by a method whose sizes
            are not known here.
    """
    stand_ins.register()
    quantizations: list[tuple[nn.Module, Any]] = []

    def make(
        owner: type[PreTrainedModel],
        config: PreTrainedConfig,
        trusted: bool,
        loading: Mapping[str, Any],
    ) -> PreTrainedModel:
        _require_plain(config)
        as_loaded = {"dtype": _dtype(loading, config), "attn_implementation": stand_ins.NAME}
        model = make_model(owner, config, trusted, as_loaded)
        quantization = loading.get("quantization_config")
        if quantization is not None:
            if isinstance(quantization, dict):
                quantization = BUILDER.build(quantization)
            quantizations.append((model, quantization))
        return model

    built = PlannedModel(build_meta_model(ConfigDict(settings), make))
    for part, quantization in quantizations:
        built.quantized |= _quantized_sizes(part, quantization)
    return built


def _require_plain(config: PreTrainedConfig) -> None:
    """Refuse weights that are stored in few bits."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    method = dict(stored if isinstance(stored, dict) else stored.to_dict()).get("quant_method")
    raise UserError(
        tr(
            "the weights of this model are quantised by {method}: no plan knows their size.",
            method=method,
        ),
        where=Where(str(config.name_or_path)),
    )


def _dtype(loading: Mapping[str, Any], config: PreTrainedConfig) -> torch.dtype:
    """As ``from_pretrained`` has it: the dtype that is asked for, else that of the files."""
    wanted = loading.get("dtype") or loading.get("torch_dtype") or "auto"
    if wanted == "auto":
        wanted = getattr(config, "dtype", None) or torch.float32
    return wanted if isinstance(wanted, torch.dtype) else torch_dtype(str(wanted))


def _quantized_sizes(part: nn.Module, quantization: Any) -> dict[int, int]:
    """Bytes of the weights that bitsandbytes quantises, by the ``id`` of the weight."""
    from transformers import PreTrainedModel
    from transformers.quantizers.quantizers_utils import should_convert_module

    from xtuner.model.lora.experts import expert_tensors, has_adapter

    skipped = getattr(quantization, "llm_int8_skip_modules", None)
    output = None  # what is named takes the place of the default
    if not skipped and isinstance(part, PreTrainedModel):
        output = part.get_output_embeddings()
    weights = [
        module.weight
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear)
        and module is not output
        and not module.weight.requires_grad
        and "lora_" not in name
        and should_convert_module(name.replace(BASE_LAYER, ""), skipped)
    ]
    if getattr(quantization, "load_in_8bit", False):
        return {id(w): w.numel() + 4 * w.shape[0] for w in weights}
    weights += [
        getattr(module, name)
        for module, name in expert_tensors(part)
        if not has_adapter(part, module)
    ]
    nested = bool(getattr(quantization, "bnb_4bit_use_double_quant", False))
    return {id(w): bytes_in_4bit(w.numel(), nested=nested) for w in weights}


def bytes_in_4bit(count: int, *, nested: bool) -> int:
    """Bytes of ``count`` weights in bitsandbytes' 4 bits, their scales and tables included.

    A block of 64 weights has a float32 scale; ``nested`` scales have 8 bits, and a float32 scale
    for 256 of them. Tables: 16 float32 values, with ``nested`` 256 more and an offset.
    """
    scales = -(-count // BLOCK_4BIT)
    size = -(-count // 2) + 16 * 4
    if not nested:
        return size + 4 * scales
    return size + scales + 4 * -(-scales // BLOCK_OF_SCALES) + 256 * 4 + 4
