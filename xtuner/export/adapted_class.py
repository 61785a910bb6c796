"""Which Auto class has the model that an adapter was trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xtuner.export.model_folder import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PREFIX = "base_model.model."
"""Of the names of an adapter's tensors."""


def auto_class_of(base: Path, names: Iterable[str], *, classifier: bool = False) -> Any:
    """The Auto class of a base whose modules an adapter names.

    A folder with vision may be loaded by two classes (Qwen3.5), with and without the visual
    encoder, whose modules have other names.

    Args:
        base: the base's folder.
        names: of the adapter's tensors.
        classifier: whether its task is that of a sequence classifier.
    """
    from transformers import CONFIG_MAPPING

    from xtuner.model.transformers_models.auto import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
        model_classes,
    )

    if classifier:
        return AutoModelForSequenceClassification
    model_type = str(read_json(base / "config.json").get("model_type"))
    seeing = model_classes(AutoModelForImageTextToText, model_type)
    if not seeing or seeing.keys() & model_classes(AutoModelForCausalLM, model_type).keys():
        return AutoModelForCausalLM
    config = CONFIG_MAPPING[model_type].from_pretrained(base)
    own = _modules(AutoModelForImageTextToText, config) - _modules(AutoModelForCausalLM, config)
    changed = {_module(name) for name in names}
    return AutoModelForImageTextToText if changed & own else AutoModelForCausalLM


def _modules(auto_class: Any, config: PreTrainedConfig) -> set[str]:
    with torch.device("meta"):
        return {name for name, _ in auto_class.from_config(config).named_modules()}


def _module(name: str) -> str:
    """The module of the base that a tensor of an adapter changes."""
    layer, found, _ = name.removeprefix(PREFIX).partition(".lora_")
    return layer if found else layer.rpartition(".")[0]
