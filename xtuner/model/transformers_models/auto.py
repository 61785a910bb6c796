"""Our classes for model families that transformers lacks, known to its Auto classes.

Folders of these families bring code of their own (``auto_map``). transformers prefers a registered
class from outside its own package to that code, with and without ``trust_remote_code``: so nothing
from the folder runs. Importing this module registers the families; import the Auto classes from
here, and they are known.

Configuration classes are registered at once, as they cost little. The classes of models are
imported when the first configuration of their family is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

__all__ = [
    "FAMILIES",
    "TOKENIZERS",
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSequenceClassification",
    "AutoTokenizer",
    "Family",
    "model_classes",
    "register",
    "register_models",
]

PACKAGE = "xtuner.model.transformers_models"


@dataclass(frozen=True)
class Family:
    """A family's classes.

    Args:
        folder: package under ``transformers_models``; it has the modules
            ``configuration_<folder>`` and ``modeling_<folder>``.
        config: name of the configuration class.
        models: for each Auto class the name of the model class. Of several, the one that the
            configuration's ``architectures`` names is taken, else the first.
    """

    folder: str
    config: str
    models: Mapping[str, str | tuple[str, ...]]

    def config_class(self) -> Any:
        return getattr(self._module("configuration"), self.config)

    def model_classes(self) -> dict[str, Any]:
        """For each Auto class the model class, or a tuple of them."""
        module = self._module("modeling")
        return {
            auto: tuple(getattr(module, name) for name in names)
            if isinstance(names, tuple)
            else getattr(module, names)
            for auto, names in self.models.items()
        }

    def _module(self, kind: str) -> Any:
        return importlib.import_module(f"{PACKAGE}.{self.folder}.{kind}_{self.folder}")


FAMILIES: dict[str, Family] = {
    "internlm": Family(
        folder="internlm",
        config="InternLMConfig",
        models={
            "AutoModel": "InternLMModel",
            "AutoModelForCausalLM": "InternLMForCausalLM",
            "AutoModelForSequenceClassification": "InternLMForSequenceClassification",
        },
    ),
    "internlm2": Family(
        folder="internlm2",
        config="InternLM2Config",
        models={
            "AutoModel": ("InternLM2Model", "InternLM2ForRewardModel"),
            "AutoModelForCausalLM": "InternLM2ForCausalLM",
            "AutoModelForSequenceClassification": (
                "InternLM2ForSequenceClassification",
                "InternLM2ForRewardModel",
            ),
        },
    ),
    "internlm3": Family(
        folder="internlm3",
        config="InternLM3Config",
        models={
            "AutoModel": "InternLM3Model",
            "AutoModelForCausalLM": "InternLM3ForCausalLM",
            "AutoModelForSequenceClassification": "InternLM3ForSequenceClassification",
        },
    ),
    "intern_vit_6b": Family(
        folder="intern_vit",
        config="InternVisionConfig",
        models={"AutoModel": "InternVisionModel"},
    ),
    "internvl_chat": Family(
        folder="internvl_chat",
        config="InternVLChatConfig",
        models=dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), "InternVLChatModel"),
    ),
    "chatglm": Family(
        folder="chatglm",
        config="ChatGLMConfig",
        models=dict.fromkeys(
            ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"),
            "ChatGLMForConditionalGeneration",
        ),
    ),
    "qwen": Family(
        folder="qwen",
        config="QWenConfig",
        models={"AutoModel": "QWenModel", "AutoModelForCausalLM": "QWenLMHeadModel"},
    ),
    "baichuan": Family(
        folder="baichuan",
        config="BaichuanConfig",
        models={
            "AutoModel": "BaichuanModel",
            "AutoModelForCausalLM": ("BaichuanForCausalLM", "BaiChuanForCausalLM"),
        },
    ),
    "minicpm": Family(
        folder="minicpm",
        config="MiniCPMConfig",
        models={"AutoModel": "MiniCPMModel", "AutoModelForCausalLM": "MiniCPMForCausalLM"},
    ),
    "orion": Family(
        folder="orion",
        config="OrionConfig",
        models={
            "AutoModel": "OrionModel",
            "AutoModelForCausalLM": "OrionForCausalLM",
            "AutoModelForSequenceClassification": "OrionForSequenceClassification",
        },
    ),
    "Yi": Family(
        folder="yi",
        config="YiConfig",
        models={
            "AutoModel": "YiModel",
            "AutoModelForCausalLM": "YiForCausalLM",
            "AutoModelForSequenceClassification": "YiForSequenceClassification",
        },
    ),
    "deepseek": Family(
        folder="deepseek",
        config="DeepseekConfig",
        models={"AutoModel": "DeepseekModel", "AutoModelForCausalLM": "DeepseekForCausalLM"},
    ),
}
"""By the ``model_type`` of ``config.json``."""

TOKENIZERS: dict[str, str] = {
    name: f"{PACKAGE}.tokenizers.families:{name}"
    for name in (
        *("InternLMTokenizer", "InternLM2Tokenizer", "InternLM3Tokenizer", "QWenTokenizer"),
        *("BaichuanTokenizer", "BaiChuanTokenizer", "ChatGLMTokenizer"),
        *("LlamaTokenizer", "LlamaTokenizerFast", "OrionTokenizer", "YiTokenizer"),
    )
}
"""``module:Class`` by the ``tokenizer_class`` of ``tokenizer_config.json``."""


def register() -> None:
    """Make the families known to transformers; again does no harm.

    ``AutoModelForCausalLM`` also loads folders of models for images and text, to be trained on
    text: transformers itself knows some of them there (Gemma 3), and refuses others (Mistral 3).
    For a few it has a class of the language model alone whose own folder no Auto class reads
    (Mllama, Emu3): there the whole model is loaded.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES

    for model_type, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        of_text = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(model_type, name)
        if list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()).count(of_text) == 1:
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = name
    for model_type, family in FAMILIES.items():
        AutoConfig.register(model_type, family.config_class(), exist_ok=True)
    for name, place in TOKENIZERS.items():
        module, _, tokenizer = place.partition(":")
        # not AutoTokenizer.register: it ties the class to a configuration, and then transformers
        # prefers the folder's code with trust_remote_code=True
        REGISTERED_TOKENIZER_CLASSES[name] = getattr(importlib.import_module(module), tokenizer)


def register_models(config_class: type) -> None:
    """Make the models of a family known to transformers, if that was not done before.

    Args:
        config_class: the family's configuration class; one of another kind is left alone.
    """
    for family in FAMILIES.values():
        if family.config != config_class.__name__:
            continue
        # transformers may have classes for a configuration of this name
        known = AutoModel._model_mapping.get(config_class, None)
        first = known[0] if isinstance(known, tuple) else known
        if first is not None and first.__module__.startswith(PACKAGE):
            continue
        for auto, model_class in family.model_classes().items():
            getattr(transformers, auto).register(config_class, model_class, exist_ok=True)


def model_classes(auto_class: Any, model_type: str) -> dict[str, Any]:
    """The classes, by name, that an Auto class has for a ``model_type``; those preferred first."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return {}
    config_class = CONFIG_MAPPING[model_type]
    register_models(config_class)
    found = auto_class._model_mapping.get(config_class, ())
    classes = found if isinstance(found, tuple) else (found,)
    return {model_class.__name__: model_class for model_class in classes}


register()
