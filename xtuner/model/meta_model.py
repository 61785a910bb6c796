"""The model of a config on torch's meta device: names and shapes without weights.

Where the config loads a model with ``from_pretrained``, it is built from its ``config.json``
instead. Everything else is built as in training, with the same adapters, resized embeddings and
heads.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from xtuner.model.remote_code import resolve_trust

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Make: TypeAlias = Callable[
    ["type[PreTrainedModel]", "PreTrainedConfig", bool, Mapping[str, Any]], "PreTrainedModel"
]
"""Makes a model from a class or an Auto class, a configuration, whether code of the folder is
trusted, and the arguments of ``from_pretrained`` that are about loading."""
_OF_THE_MODEL = ("dtype", "attn_implementation")
# Arguments of from_pretrained that are not settings of a model's config.
_LOADING_ONLY = (
    "dtype", "torch_dtype", "quantization_config", "device_map", "low_cpu_mem_usage",
    "offload_folder", "attn_implementation", "load_in_4bit", "load_in_8bit", "use_safetensors",
)  # fmt: skip


def make_model(
    owner: type[PreTrainedModel],
    config: PreTrainedConfig,
    trusted: bool,
    loading: Mapping[str, Any],
) -> PreTrainedModel:
    """Make a model of a class, or of the class that an Auto class has for a configuration."""
    settings = {name: loading[name] for name in _OF_THE_MODEL if loading.get(name) is not None}
    if hasattr(owner, "from_config"):  # an Auto class
        auto: Any = owner
        model: PreTrainedModel = auto.from_config(config, trust_remote_code=trusted, **settings)
        return model
    return owner._from_config(config, **settings)


def build_meta_model(model: Mapping[str, Any], make: Make | None = None) -> Any:
    """Build the model of a config (its ``model`` section) on the meta device.

    Args:
        model: the section, in which imported names are no longer lazy.
        make: makes each model that the config would load, in place of one without the arguments
            that are about loading.
    """
    from xtuner.registry import BUILDER

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        section = without_pretrained_weights(model, make or _without_settings)
        try:
            with torch.device("meta"):
                return BUILDER.build(section)
        except RuntimeError as error:
            if "from_pretrained" not in str(error):
                raise
        # a function of the user's own loads the model: only with its weights
        built: Any = BUILDER.build(section)
        return built.to("meta")


def keep_on_meta(model: nn.Module) -> None:
    """Put parameters of a model without weights on the meta device, too, that have random values.

    Some are made by functions that a device as a context does not reach (``torch.normal``).
    """
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if not weight.is_meta:
                empty = torch.empty_like(weight, device="meta")
                setattr(module, name, nn.Parameter(empty, weight.requires_grad))


def without_pretrained_weights(node: object, make: Make) -> Any:
    """A copy of a config section in which each ``from_pretrained`` of a model loads no weights."""
    if isinstance(node, Mapping):
        copied = {key: without_pretrained_weights(value, make) for key, value in node.items()}
        if "pretrained_pth" in copied:
            copied["pretrained_pth"] = None
        if getattr(copied.get("type"), "needs_weights", False):
            copied["loader"] = _meta_loader(_auto_model(), make)
        if is_model_loader(copied.get("type")):
            copied["type"] = _meta_loader(copied["type"].__self__, make)
        return copied
    if isinstance(node, list | tuple):
        return type(node)(without_pretrained_weights(item, make) for item in node)
    return node


def _auto_model() -> Any:
    from xtuner.model.transformers_models.auto import AutoModel

    return AutoModel


def is_model_loader(value: object) -> bool:
    """Whether a config's ``type`` is the ``from_pretrained`` of a model's class."""
    owner = getattr(value, "__self__", None)
    return (
        getattr(value, "__name__", "") == "from_pretrained"
        and isinstance(owner, type)
        and (hasattr(owner, "from_config") or hasattr(owner, "_from_config"))
    )


def _without_settings(
    owner: type[PreTrainedModel],
    config: PreTrainedConfig,
    trusted: bool,
    loading: Mapping[str, Any],
) -> PreTrainedModel:
    return make_model(owner, config, trusted, {})


def _meta_loader(owner: type[PreTrainedModel], make: Make) -> Callable[..., Any]:
    @functools.wraps(owner.from_pretrained)
    def from_pretrained(
        pretrained_model_name_or_path: str, trust_remote_code: bool = False, **settings: object
    ) -> PreTrainedModel:
        from xtuner.model.transformers_models.auto import AutoConfig

        path = str(pretrained_model_name_or_path)
        loading = {name: settings.pop(name, None) for name in _LOADING_ONLY}
        trusted = resolve_trust(owner, path, trusted=trust_remote_code)
        config: Any = settings.pop("config", None) or AutoConfig.from_pretrained(
            path, trust_remote_code=trusted, **settings
        )
        model: PreTrainedModel = make(owner, config, trusted, loading)
        model.config.name_or_path = path
        model.name_or_path = path
        return model

    return from_pretrained
