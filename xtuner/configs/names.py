"""The grammar of config names: a model, a method, a dataset and options.

``<model>_<method>_<dataset>_e<epochs>`` and optionally ``_8k`` or ``_1M`` (tokens of a row),
``_gpu8`` or ``_8gpus`` (the number of GPUs), ``_sp4`` or ``_sequence_parallel_4`` (GPUs that share
a row), and ``_varlen``. Preference methods may leave out the dataset and the epochs.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from xtuner.configs.cards import DatasetCard, ModelCard
from xtuner.configs.datasets import DATASETS
from xtuner.configs.models import MODELS
from xtuner.configs.settings import METHODS, Method
from xtuner.configs.unknown import UnknownConfig, nearest

DEFAULT_PREFERENCES = "orpo_dpo_mix_40k"
# Datasets whose names follow the model at once: full fine-tuning.
METHODLESS = ("w_tokenized_dataset", "w_untokenized_dataset", "w_internevo_dataset")
USUAL_BATCHES = 16  # micro-batches of one optimizer step, over all GPUs

_OPTION = re.compile(
    r"_(?:e(?P<epochs>\d+)|(?P<thousands>\d+)k|(?P<millions>\d+)M"
    r"|gpu(?P<gpus>\d+)|(?P<gpus_too>\d+)gpus?"
    r"|sp(?P<parallel>\d+)|sequence_parallel_(?P<parallel_too>\d+)|(?P<varlen>varlen))(?=_|$)"
)


@dataclass(frozen=True)
class ConfigName:
    """A parsed config name: the cards that it names, and the settings of its options."""

    name: str
    model: ModelCard
    method_name: str
    method: Method
    dataset: DatasetCard
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def benchmark(self) -> bool:
        """Whether it measures speed: a length and GPUs per row, but no epochs."""
        return {"max_length", "sequence_parallel_size"} <= set(self.options) and (
            "max_epochs" not in self.options
        )


def parse(name: str, known: Iterable[str] = ()) -> ConfigName:
    """Parse a config name.

    Args:
        name: for example ``qwen2_5_7b_instruct_lora_alpaca_zh_e2``.
        known: the names to suggest from.

    Raises:
        UnknownConfig: when it does not follow the grammar, or its parts do not fit each other.
    """
    model, rest = _model(name, known)
    method_name, rest = _method(name, model, rest, known)
    method = METHODS[method_name]
    dataset, rest = _dataset(name, method, rest, known)
    parsed = ConfigName(
        name, model, method_name, method, dataset, _options(name, method, dataset, rest, known)
    )
    _refuse_mismatch(parsed, known)
    return parsed


def _starts(text: str, words: Iterable[str]) -> str | None:
    """The longest of ``words`` that ``text`` begins with; an underscore or the end follows."""
    found = [word for word in words if text == word or text.startswith(word + "_")]
    return max(found, key=len, default=None)


def _model(name: str, known: Iterable[str]) -> tuple[ModelCard, str]:
    found = _starts(name, MODELS)
    if found is None:
        near = difflib.get_close_matches(_before_method(name), MODELS, n=3, cutoff=0.4)
        if not near:
            raise UnknownConfig(
                name, "it does not begin with a model of the catalogue", nearest(name, known)
            )
        raise UnknownConfig(
            name,
            "no model of the catalogue is called so; the nearest are {near}",
            nearest(name, known),
            near=", ".join(near),
        )
    return MODELS[found], name[len(found) :].removeprefix("_")


@functools.cache
def _method_words() -> re.Pattern[str]:
    return re.compile("_(?:" + "|".join(sorted(METHODS, key=len, reverse=True)) + ")(?:_|$)")


def _before_method(name: str) -> str:
    """The part of a name before the method: the model."""
    return _method_words().split(name)[0]


def _method(name: str, model: ModelCard, rest: str, known: Iterable[str]) -> tuple[str, str]:
    found = _starts(rest, METHODS)
    if found is None and _starts(rest, METHODLESS):
        return "full", rest
    if found is None:
        near = nearest(name, known)
        methods = ", ".join(method for method in METHODS if "varlen" not in method)
        if rest:
            raise UnknownConfig(
                name,
                "after the model {model} comes a method ({methods}), not {rest!r}",
                near,
                model=model.name,
                methods=methods,
                rest=rest,
            )
        raise UnknownConfig(
            name,
            "after the model {model} comes a method ({methods}), and there is none",
            near,
            model=model.name,
            methods=methods,
        )
    return found, rest[len(found) :].removeprefix("_")


def _dataset(name: str, method: Method, rest: str, known: Iterable[str]) -> tuple[DatasetCard, str]:
    found = _starts(rest, DATASETS)
    if found is not None:
        return DATASETS[found], rest[len(found) :]
    if method.kind != "sft" and (not rest or _OPTION.match("_" + rest)):
        return DATASETS[DEFAULT_PREFERENCES], "_" + rest if rest else ""
    fitting = [card.name for card in DATASETS.values() if _fits(card, method)]
    likely = ", ".join(dict.fromkeys(difflib.get_close_matches(rest, fitting, n=2) + fitting[:5]))
    near = nearest(name, known)
    if rest:
        raise UnknownConfig(
            name,
            "after the method comes a dataset ({likely}, ...), not {rest!r}",
            near,
            likely=likely,
            rest=rest,
        )
    raise UnknownConfig(
        name,
        "after the method comes a dataset ({likely}, ...), and there is none",
        near,
        likely=likely,
    )


def _fits(dataset: DatasetCard, method: Method) -> bool:
    return (dataset.kind == "preference") == (method.kind != "sft")


def _options(
    name: str, method: Method, dataset: DatasetCard, rest: str, known: Iterable[str]
) -> dict[str, Any]:
    """The settings of the options at the end of a name."""
    options: dict[str, Any] = {}
    position = 0
    while position < len(rest):
        match = _OPTION.match(rest, position)
        if match is None:
            left = rest[position:].removeprefix("_")
            raise UnknownConfig(
                name,
                "{left!r} is not an option: after the dataset come e3 (epochs) and optionally 8k "
                "(tokens of a row), gpu8 (number of GPUs), sp4 (GPUs that share a row)",
                nearest(name, known),
                left=left,
            )
        options.update(_settings_of(match))
        position = match.end()
    benchmark = {"max_length", "sequence_parallel_size"} <= set(options)
    epochs_known = "max_epochs" in {**options, **dataset.settings} or method.kind != "sft"
    if not epochs_known and not benchmark:
        raise UnknownConfig(
            name,
            "it does not say for how many epochs, as {name}_e3 does",
            [f"{name}_e3"],
            name=name,
        )
    return options


def _settings_of(match: re.Match[str]) -> dict[str, Any]:
    """The settings of one option."""
    value = {key: text for key, text in match.groupdict().items() if text is not None}
    if "epochs" in value:
        return {"max_epochs": int(value["epochs"])}
    if "thousands" in value:
        return {"max_length": int(value["thousands"]) * 1024}
    if "millions" in value:
        return {"max_length": int(value["millions"]) * 1024 * 1024}
    if "varlen" in value:
        return {"use_varlen_attn": True}
    gpus = value.get("gpus") or value.get("gpus_too")
    if gpus:
        return {"accumulative_counts": max(1, USUAL_BATCHES // int(gpus))}
    return {"sequence_parallel_size": int(value.get("parallel") or value["parallel_too"])}


def _refuse_mismatch(parsed: ConfigName, known: Iterable[str]) -> None:
    """Refuse a name whose model, method, dataset and options do not fit each other."""
    model, method, dataset = parsed.model, parsed.method, parsed.dataset
    if not _fits(dataset, method):
        fitting = [card.name for card in DATASETS.values() if _fits(card, method)]
        likely = ", ".join(fitting[:8])
        raise UnknownConfig(
            parsed.name,
            "{method} does not learn from {dataset}, which holds "
            "{kind} rows; it learns from {likely}",
            [parsed.name.replace(dataset.name, other) for other in fitting[:3]],
            method=parsed.method_name,
            dataset=dataset.name,
            kind=dataset.kind,
            likely=likely,
        )
    if dataset.kind == "vision" and (model.kind != "vision" or method.weights == "int8_lora"):
        takers = [card.name for card in MODELS.values() if card.kind == "vision"]
        near = difflib.get_close_matches(model.name, takers, n=3, cutoff=0) or takers[:3]
        raise UnknownConfig(
            parsed.name,
            "{dataset} has images, which {model} is not trained on by {method}; models that take "
            "images are {takers}, by full, lora or qlora",
            [f"{taker}_lora_{dataset.name}_e1" for taker in near],
            dataset=dataset.name,
            model=model.name,
            method=parsed.method_name,
            takers=", ".join([*near, "..."]),
        )
    if method.kind != "sft" and not model.chat:
        family = model.name.removesuffix("_base")
        chat = [
            parsed.name.replace(model.name, card.name, 1)
            for card in MODELS.values()
            if card.chat and card.name.startswith(family)
        ]
        raise UnknownConfig(
            parsed.name,
            "{kind} starts from a chat model, and {model} is a base model",
            chat,
            kind=method.kind,
            model=model.name,
        )
    if method.kind == "reward" and "reward_token_id" not in model.settings:
        raise UnknownConfig(
            parsed.name,
            "the card of {model} names no spare token at which the reward could be read",
            nearest(parsed.name, (name for name in known if "_reward_" in name)),
            model=model.name,
        )
    if "use_varlen_attn" in parsed.options and not dataset.packed:
        raise UnknownConfig(
            parsed.name,
            "rows of {dataset} are not packed: varlen would have nothing to keep apart",
            [parsed.name.replace("_varlen", "")],
            dataset=dataset.name,
        )
    reason = why_unsupported(model, parsed.method_name)
    if reason is not None:
        raise UnknownConfig(parsed.name, reason, nearest(parsed.name, known))


def why_unsupported(model: ModelCard, method: str) -> str | None:
    """Why a model cannot be trained by a method of ``METHODS``; None where it can."""
    words = (method, METHODS[method].kind, METHODS[method].weights)
    return next((model.unsupported[word] for word in words if word in model.unsupported), None)
