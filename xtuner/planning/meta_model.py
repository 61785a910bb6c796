"""The model of a config on torch's meta device: its class, its adapters, no weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from mmengine.config import ConfigDict
from torch import nn

from xtuner.planning import stand_ins
from xtuner.registry import BUILDER
from xtuner.utils.dtypes import torch_dtype
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BLOCK_4BIT, BLOCK_OF_SCALES = 64, 256
"""Weights of a scale in bitsandbytes' 4 bits, and scales of a scale of scales."""


@dataclass
class MetaModel:
    """A model without weights.

    Attributes:
        model: an instance of the config's model class.
        quantized: bytes of the weights that the run keeps in 4 or 8 bits, by their ``id``; here
            they have their original dtype.
    """

    model: nn.Module
    quantized: dict[int, int] = field(default_factory=dict)

    def size_of(self, weight: nn.Parameter) -> int:
        """Bytes of a weight as the run keeps it."""
        return self.quantized.get(id(weight), weight.numel() * weight.element_size())


def build_meta_model(settings: Mapping[str, Any]) -> MetaModel:
    """Build a config's model: what ``from_pretrained`` would load is made from ``config.json``.

    Args:
        settings: the config's ``model``; imported names in it may be lazy.

    Raises:
        UserError: when there is no such model, or its folder is quantised by a method whose sizes
            are not known here.
    """
    settings = ConfigDict(settings)
    full = settings.get("lora") is None and settings.get("peft_model") is None
    quantizations: list[tuple[nn.Module, Any]] = []
    stand_ins.register()
    with torch.device("meta"):
        model = BUILDER.build(_with_models(settings, full, quantizations))
    built = MetaModel(model)
    for part, quantization in quantizations:
        built.quantized |= _quantized_sizes(part, quantization)
    return built


def _with_models(value: Any, full: bool, quantizations: list[tuple[nn.Module, Any]]) -> Any:
    """Settings in which models take the place of the settings to load them."""
    if isinstance(value, list | tuple):
        return type(value)(_with_models(item, full, quantizations) for item in value)
    if not isinstance(value, dict):
        return value
    owner = _loader(value)
    if owner is None:
        items = {key: _with_models(item, full, quantizations) for key, item in value.items()}
        return ConfigDict(items)
    model = _meta(owner, value, full)
    quantization = value.get("quantization_config")
    if quantization is not None:
        if isinstance(quantization, dict):
            quantization = BUILDER.build(quantization)
        quantizations.append((model, quantization))
    return model


def _loader(settings: Mapping[str, Any]) -> Any | None:
    """The class that loads a model, where settings describe one."""
    from transformers import PreTrainedModel

    kind = settings.get("type")
    owner = getattr(kind, "__self__", None)
    if getattr(kind, "__name__", "") != "from_pretrained" or not inspect.isclass(owner):
        return None
    is_model = hasattr(owner, "_model_mapping") or issubclass(owner, PreTrainedModel)
    return owner if is_model else None


def _meta(owner: Any, settings: Mapping[str, Any], full: bool) -> nn.Module:
    config = _config_of(owner, settings)
    name = str(settings["pretrained_model_name_or_path"])
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = dict(stored if isinstance(stored, dict) else stored.to_dict()).get("quant_method")
        raise UserError(
            tr(
                "the weights of this model are quantised by {method}: no plan knows their size.",
                method=method,
            ),
            where=Where(name),
        )
    dtype = _dtype(settings, config, full)
    config._attn_implementation = stand_ins.NAME
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if hasattr(owner, "_model_mapping"):
            trusted = bool(settings.get("trust_remote_code"))
            model: nn.Module = owner.from_config(
                config, trust_remote_code=trusted, attn_implementation=stand_ins.NAME, dtype=dtype
            )
        else:
            model = owner(config)
    finally:
        torch.set_default_dtype(default)
    return model


def _config_of(owner: Any, settings: Mapping[str, Any]) -> PreTrainedConfig:
    from xtuner.model.transformers_models.auto import AutoConfig

    given: PreTrainedConfig | None = settings.get("config")
    if given is not None and not isinstance(given, dict):
        return given
    loader = getattr(owner, "config_class", None) or AutoConfig
    arguments = dict(
        type=loader.from_pretrained,
        pretrained_model_name_or_path=settings["pretrained_model_name_or_path"],
    )
    if settings.get("trust_remote_code"):
        arguments["trust_remote_code"] = True
    config: PreTrainedConfig = BUILDER.build(ConfigDict(arguments))
    return config


def _dtype(settings: Mapping[str, Any], config: PreTrainedConfig, full: bool) -> torch.dtype:
    """As ``model.loading``: float32 where all weights are trained and nothing else is said."""
    wanted = settings.get("dtype") or settings.get("torch_dtype")
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted and wanted != "auto":
        return torch_dtype(str(wanted))
    if full and wanted is None:
        return torch.float32
    stored = getattr(config, "dtype", None)
    if isinstance(stored, str):
        stored = torch_dtype(stored)
    return stored or torch.float32


def _quantized_sizes(part: nn.Module, quantization: Any) -> dict[int, int]:
    """Bytes of the weights that bitsandbytes quantises, by the ``id`` of the weight."""
    from transformers import PreTrainedModel

    from xtuner.model.lora.experts import expert_tensors, has_adapter

    output = part.get_output_embeddings() if isinstance(part, PreTrainedModel) else None
    skipped = set(getattr(quantization, "llm_int8_skip_modules", None) or ())
    weights = [
        module.weight
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear)
        and module is not output
        and not module.weight.requires_grad
        and "lora_" not in name
        and not skipped & set(name.split("."))
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
