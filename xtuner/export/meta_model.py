"""The model of a config on torch's meta device: names and shapes without weights.

Where the config loads a model with ``from_pretrained``, it is built from its ``config.json``
instead. Everything else is built as in training, with the same adapters, resized embeddings and
heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from xtuner.export.model_folder import find_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel
from xtuner.model.remote_code import resolve_trust

# Arguments of from_pretrained that are not settings of a model's config.
_LOADING_ONLY = (
    "dtype", "torch_dtype", "quantization_config", "device_map", "low_cpu_mem_usage",
    "offload_folder", "attn_implementation", "load_in_4bit", "load_in_8bit", "use_safetensors",
)  # fmt: skip


def build_meta_model(model: Mapping[str, Any]) -> Any:
    """Build the model of a config (its ``model`` section) on the meta device."""
    from xtuner.registry import BUILDER

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            return BUILDER.build(without_pretrained_weights(model))


def without_pretrained_weights(node: object) -> Any:
    """A copy of a config section in which each ``from_pretrained`` of a model loads no weights."""
    if isinstance(node, Mapping):
        copied = {key: without_pretrained_weights(value) for key, value in node.items()}
        if "quantization_config" in copied:
            copied["quantization_config"] = None
        if "pretrained_pth" in copied:
            copied["pretrained_pth"] = None
        if is_model_loader(copied.get("type")):
            copied["type"] = _meta_loader(copied["type"].__self__)
        return copied
    if isinstance(node, list | tuple):
        return type(node)(without_pretrained_weights(item) for item in node)
    return node


def is_model_loader(value: object) -> bool:
    """Whether a config's ``type`` is the ``from_pretrained`` of a model's class."""
    owner = getattr(value, "__self__", None)
    return (
        getattr(value, "__name__", "") == "from_pretrained"
        and isinstance(owner, type)
        and (hasattr(owner, "from_config") or hasattr(owner, "_from_config"))
    )


def _meta_loader(owner: type[PreTrainedModel]) -> Callable[..., Any]:
    def from_pretrained(
        pretrained_model_name_or_path: str, trust_remote_code: bool = False, **settings: object
    ) -> PreTrainedModel:
        from xtuner.model.transformers_models.auto import AutoConfig

        path = str(pretrained_model_name_or_path)
        for name in _LOADING_ONLY:
            settings.pop(name, None)
        trusted = resolve_trust(owner, path, trusted=trust_remote_code)
        config = settings.pop("config", None) or AutoConfig.from_pretrained(
            find_model(path), trust_remote_code=trusted, **settings
        )
        if hasattr(owner, "from_config"):  # an Auto class
            loader: Any = owner
            model = loader.from_config(config, trust_remote_code=trusted)
        else:
            model = owner._from_config(config)
        model.config.name_or_path = path
        model.name_or_path = path
        return model

    return from_pretrained
