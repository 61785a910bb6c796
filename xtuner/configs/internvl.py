"""InternVL's configs: ``internvl_<version>_<model>_[lora_|qlora_]finetune``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from xtuner.configs.cards import Code, ModelCard
from xtuner.configs.fragments import Fragment, expression, filled, part
from xtuner.configs.render import assemble, headline, info_hook, literal, optim, runtime, tokenizer
from xtuner.configs.settings import DEFAULTS
from xtuner.configs.unknown import UnknownConfig, nearest

METHODS = {"": "full", "lora_": "lora", "qlora_": "qlora"}


@dataclass(frozen=True)
class InternVLCard:
    """One InternVL: its place in names, hub path, parameters, template and settings."""

    name: str
    path: str
    billions: float
    template: str = "internlm2_chat"
    max_length: int = 8192
    weight_decay: float = 0.05


CARDS = (
    InternVLCard(
        "v1_5_internlm2_26b",
        "OpenGVLab/InternVL-Chat-V1-5",
        25.5,
        max_length=4096,
        weight_decay=0.01,
    ),
    InternVLCard("v1_5_internlm2_2b", "OpenGVLab/Mini-InternVL-Chat-2B-V1-5", 2.2),
    InternVLCard("v1_5_phi3_4b", "OpenGVLab/Mini-InternVL-Chat-4B-V1-5", 4.1, "phi3_chat"),
    InternVLCard("v2_internlm2_26b", "OpenGVLab/InternVL2-26B", 25.5),
    InternVLCard("v2_internlm2_2b", "OpenGVLab/InternVL2-2B", 2.2),
    InternVLCard("v2_internlm2_5_8b", "OpenGVLab/InternVL2-8B", 8.1),
    InternVLCard("v2_phi3_4b", "OpenGVLab/InternVL2-4B", 4.1, "phi3_chat"),
)

_NAMES: Mapping[str, tuple[InternVLCard, str]] = {
    f"internvl_{card.name}_{word}finetune": (card, method)
    for card in CARDS
    for word, method in METHODS.items()
}


def names() -> list[str]:
    """All names of the family."""
    return list(_NAMES)


def describe(name: str, known: Iterable[str]) -> dict[str, Any]:
    """What a name trains; see ``catalogue.describe``."""
    card, method = _look_up(name, known)
    return {
        "name": name,
        "model": f"internvl_{card.name}",
        "path": card.path,
        "billions": card.billions,
        "method": method,
        "dataset": "llava_instruct",
    }


def render(name: str, known: Iterable[str]) -> str:
    """The text of a config.

    Raises:
        UnknownConfig: when the family has no such name.
    """
    card, method = _look_up(name, known)
    values = _values(card, method)
    what = f"{card.path.rpartition('/')[2]}: {method} fine-tuning, on LLaVA-Instruct, 1 epoch."
    return assemble(
        headline(what, name, method, card.billions, values),
        [
            [_tokenizer(card, values), _model(method)],
            [part("data_internvl"), filled(part("loader_grouped"), {"DATASET": "llava_dataset"})],
            [optim(values, "accumulative_counts")],
            [runtime([info_hook()], values)],
        ],
        values,
    )


def _look_up(name: str, known: Iterable[str]) -> tuple[InternVLCard, str]:
    if name not in _NAMES:
        models = ", ".join(card.name for card in CARDS)
        raise UnknownConfig(
            name,
            "an InternVL config is called internvl_<model>_finetune, _lora_finetune or "
            "_qlora_finetune, where the model is one of {models}",
            nearest(name, known),
            models=models,
        )
    return _NAMES[name]


def _values(card: InternVLCard, method: str) -> dict[str, Any]:
    batch_size, accumulative_counts = (4, 4) if method == "full" else (8, 2)
    if card.billions > 20:
        batch_size, accumulative_counts = (1, 8) if method == "full" else (2, 4)
    return {
        **DEFAULTS,
        "path": card.path,
        "prompt_template": Code(f"PROMPT_TEMPLATE.{card.template}"),
        "data_root": "./data/llava_data/",
        "data_path": Code('data_root + "LLaVA-Instruct-150K/llava_v1_5_mix665k.json"'),
        "image_folder": Code('data_root + "llava_images"'),
        "max_length": card.max_length,
        "batch_size": batch_size,
        "accumulative_counts": accumulative_counts,
        "dataloader_num_workers": 4,
        "max_epochs": 1,
        "lr": 1e-6,
        "weight_decay": card.weight_decay,
        "save_steps": 1000,
        "save_total_limit": 1,
        "save_optimizer": False,
    }


def _tokenizer(card: InternVLCard, values: Mapping[str, Any]) -> Fragment:
    model = ModelCard(card.name, card.path, card.billions)
    return tokenizer(model, "path", values)


def _model(method: str) -> Fragment:
    lora = part("internvl_lora")
    quantized = {"quantization_llm": "True", "quantization_vit": "False"}
    model = filled(
        part("model_internvl"),
        {
            "FREEZE_LLM": literal(method != "full"),
            "QUANTIZATION": quantized if method == "qlora" else {},
            "LLM_LORA": {} if method == "full" else {"llm_lora": expression(lora)},
        },
    )
    return Fragment(model.text, {**model.modules, **lora.modules})
