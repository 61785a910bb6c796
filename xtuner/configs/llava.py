"""LLaVA's configs: a chat model with CLIP as its visual encoder.

``llava_<model>[_full|_lora|_qlora|_quant]_clip_vit_large_p14_336[_lora|_full]_e<epochs>_gpu<GPUs>``
``[_sharegpt4v|_internvl]_<pretrain|finetune>``, and ``llava_v15_<7b|13b>_<pretrain|finetune|...>``,
the settings of the paper. The word before ``clip`` says how the language model is trained, the
word after it how the visual encoder is; nothing means frozen, or, for the language model while
fine-tuning, all of it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from xtuner.configs.cards import Code, ModelCard
from xtuner.configs.fragments import Fragment, expression, filled, part
from xtuner.configs.models import MODELS
from xtuner.configs.render import (
    assemble,
    headline,
    info_hook,
    language_model,
    literal,
    lora_placeholders,
    optim,
    runtime,
    tokenizer,
)
from xtuner.configs.settings import DEFAULTS, INTERNVL_SETS
from xtuner.configs.unknown import UnknownConfig, nearest

CLIP = "clip_vit_large_p14_336"
_NAME = re.compile(
    rf"llava_(?P<model>.+?)(?:_(?P<llm>full|qlora|lora|quant))?_{CLIP}(?:_(?P<visual>lora|full))?"
    r"_e(?P<epochs>\d+)_gpu(?P<gpus>\d+)(?:_(?P<data>sharegpt4v|internvl))?"
    r"_(?P<stage>pretrain|finetune)"
)
_PAPER = re.compile(r"llava_v15_(?P<size>7b|13b)_(?P<stage>pretrain|finetune)(?:_(?P<llm>lora))?")
_HELP = f"llava_<model>[_full|_qlora]_{CLIP}[_lora|_full]_e1_gpu8_<pretrain|finetune>"


@dataclass(frozen=True)
class LlavaName:
    """A parsed name. ``llm`` is full, lora, qlora, quant or frozen; ``visual`` full, lora or
    frozen; ``data`` llava, sharegpt4v or internvl."""

    name: str
    model: ModelCard
    llm: str
    visual: str
    stage: str
    data: str
    epochs: int
    gpus: int


def _pretrain(*models: str) -> list[str]:
    return [f"llava_{model}_{CLIP}_e1_gpu8_pretrain" for model in models]


def _qlora(*models: str) -> list[str]:
    return [f"llava_{model}_qlora_{CLIP}_lora_e1_gpu8_finetune" for model in models]


_LLAMA3, _PHI3 = "llava_llama3_8b_instruct", "llava_phi3_mini_4k_instruct"
_BOTH = (
    "internlm_chat_7b",
    "internlm2_chat_1_8b",
    "internlm2_chat_7b",
    "internlm2_chat_20b",
    "vicuna_7b_v15",
    "vicuna_13b_v15",
)
NAMES = (
    *_pretrain(*_BOTH, "llama3_8b_instruct", "phi3_mini_4k_instruct"),
    *_qlora(*_BOTH),
    f"llava_internlm2_chat_7b_{CLIP}_e1_gpu8_finetune",
    f"llava_internlm2_chat_20b_{CLIP}_e1_gpu8_finetune",
    f"llava_llama3_70b_instruct_quant_{CLIP}_e1_gpu8_pretrain",
    f"{_LLAMA3}_{CLIP}_e1_gpu8_sharegpt4v_pretrain",
    f"{_LLAMA3}_full_{CLIP}_e1_gpu8_finetune",
    f"{_LLAMA3}_full_{CLIP}_lora_e1_gpu8_finetune",
    f"{_LLAMA3}_full_{CLIP}_lora_e1_gpu8_internvl_finetune",
    f"{_LLAMA3}_qlora_{CLIP}_e1_gpu1_finetune",
    f"{_LLAMA3}_quant_{CLIP}_e1_gpu1_pretrain",
    f"{_PHI3}_{CLIP}_e1_gpu8_sharegpt4v_pretrain",
    f"{_PHI3}_full_{CLIP}_e1_gpu8_finetune",
    f"{_PHI3}_full_{CLIP}_full_e2_gpu8_internvl_finetune",
    *(
        f"llava_v15_{size}_{stage}"
        for size in ("7b", "13b")
        for stage in ("pretrain", "finetune", "finetune_lora")
    ),
)

# Published settings that follow no rule; later ones take precedence.
EXCEPTIONS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    (f"*_full_{CLIP}_*_finetune", {"save_steps": 1000, "evaluation_freq": 1000}),
    ("*_sharegpt4v_pretrain", {"batch_size": 16, "accumulative_counts": 2}),
    ("*_sharegpt4v_pretrain", {"save_steps": 1000, "evaluation_freq": 1000}),
    ("*_internvl_finetune", {"save_steps": 5000, "evaluation_freq": 5000}),
    (f"{_LLAMA3}_*_internvl_finetune", {"batch_size": 4, "accumulative_counts": 4}),
    (f"llava_internlm2_chat_20b_{CLIP}_*_finetune", {"batch_size": 4, "accumulative_counts": 4}),
    ("llava_internlm2_chat_20b_qlora_*", {"batch_size": 8, "accumulative_counts": 2}),
    ("llava_llama3_70b_*_pretrain", {"lr": 5e-4}),
    ("llava_v15_*_finetune", {"batch_size": 16, "accumulative_counts": 1}),
    ("*_gpu1_*", {"batch_size": 1, "save_steps": 50000, "evaluation_freq": 50000}),
    ("*_gpu1_pretrain", {"accumulative_counts": 256}),
    ("*_gpu1_finetune", {"accumulative_counts": 128, "lora_r": 64, "lora_alpha": 16}),
)


def names() -> list[str]:
    """The curated names of the family."""
    return list(NAMES)


def describe(name: str, known: Iterable[str]) -> dict[str, Any]:
    """What a name trains; see ``catalogue.describe``."""
    parsed = parse(name, known)
    return {
        "name": name,
        "model": f"llava_{parsed.model.name}",
        "path": parsed.model.path,
        "billions": parsed.model.billions,
        "method": "full" if parsed.llm in ("frozen", "quant") else parsed.llm,
        "dataset": f"{parsed.data}_{parsed.stage}",
    }


def parse(name: str, known: Iterable[str]) -> LlavaName:
    """Parse a config name.

    Raises:
        UnknownConfig: when it is none of the family; says why.
    """
    paper = _PAPER.fullmatch(name)
    if paper:
        stage = paper["stage"]
        llm = paper["llm"] or ("frozen" if stage == "pretrain" else "full")
        card = MODELS[f"vicuna_{paper['size']}_v15"]
        return LlavaName(name, card, llm, "frozen", stage, "llava", 1, 8)
    match = _NAME.fullmatch(name)
    if not match:
        raise UnknownConfig(
            name, "a LLaVA config is called {form}", nearest(name, known), form=_HELP
        )
    groups = match.groupdict()
    model = MODELS.get(groups["model"])
    if model is None or not model.chat:
        chat = [card.name for card in MODELS.values() if card.chat]
        near = ", ".join(nearest(groups["model"], chat))
        raise UnknownConfig(
            name,
            "LLaVA starts from a chat model, and {model} is none; the nearest are {near}",
            nearest(name, known),
            model=groups["model"],
            near=near,
        )
    llm = groups["llm"] or ("frozen" if groups["stage"] == "pretrain" else "full")
    if llm == "frozen" and model.name.startswith(("internlm", "vicuna")):
        llm = "quant"
    return LlavaName(
        name,
        model,
        llm,
        groups["visual"] or "frozen",
        groups["stage"],
        groups["data"] or "llava",
        int(groups["epochs"]),
        int(groups["gpus"]),
    )


def render(name: str, known: Iterable[str]) -> str:
    """The text of a config.

    Raises:
        UnknownConfig: when the family has no such name.
    """
    parsed = parse(name, known)
    values = values_of(parsed)
    stage = "learning to see" if parsed.stage == "pretrain" else "fine-tuning"
    what = f"LLaVA of {parsed.model.title}: {stage}, language model {parsed.llm}, "
    what += f"visual encoder {parsed.visual}."
    weights = "full" if parsed.llm == "full" else "lora"
    return assemble(
        headline(what, name, weights, parsed.model.billions, values),
        [
            [
                tokenizer(parsed.model, "llm_name_or_path", values),
                part("image_processor"),
                _model(parsed, values),
            ],
            _data(parsed),
            [optim(values, "accumulative_counts")],
            [runtime([info_hook(), _hook()], values)],
        ],
        values,
    )


def values_of(parsed: LlavaName) -> dict[str, Any]:
    """Every setting of a name, and the values of the parts' placeholders."""
    values = {
        **DEFAULTS,
        "llm_name_or_path": parsed.model.path,
        "visual_encoder_name_or_path": "openai/clip-vit-large-patch14-336",
        "prompt_template": Code(f"PROMPT_TEMPLATE.{parsed.model.template}"),
        "max_length": Code("int(2048 - (336 / 14) ** 2)"),
        "dataloader_num_workers": 4,
        "max_epochs": parsed.epochs,
        "SYSTEM": "",
        "evaluation_images": "https://llava-vl.github.io/static/images/view.jpg",
        "evaluation_inputs": ["图片里有什么？", "What is in the picture?"],
        "lora_r": 128 if parsed.llm == "lora" else 512,
        "lora_alpha": 256,
        "lora_dropout": 0.05,
        **_data_values(parsed),
    }
    if parsed.stage == "pretrain":
        values.update(batch_size=32, accumulative_counts=1, lr=1e-3)
    else:
        values.update(_finetune_values(parsed))
    for pattern, settings in EXCEPTIONS:
        if fnmatch.fnmatchcase(parsed.name, pattern):
            values.update(settings)
    return values


def _finetune_values(parsed: LlavaName) -> dict[str, Any]:
    full = parsed.llm == "full"
    data = "_sharegpt4v" if parsed.data == "internvl" else ""
    before = f"llava_{parsed.model.name}_{CLIP}_e1_gpu8{data}_pretrain"
    if parsed.name.startswith("llava_v15_"):
        before = parsed.name.partition("_finetune")[0] + "_pretrain"
    steps = 9742 if data else 2181
    if parsed.gpus == 1:
        before, steps = f"llava_{parsed.model.name}_quant_{CLIP}_e1_gpu1_pretrain", 558128
    return {
        "batch_size": 8 if full else 16,
        "accumulative_counts": 2 if full else 1,
        "lr": 2e-5 if full else 2e-4,
        "pretrained_pth": f"./work_dirs/{before}/iter_{steps}.pth",
    }


def _data_values(parsed: LlavaName) -> dict[str, Any]:
    if parsed.data == "internvl":
        return _mixture()
    if parsed.data == "sharegpt4v":
        return {
            "max_length": Code("int(4096 - (336 / 14) ** 2)"),
            "data_root": "./data/sharegpt4v/",
            "data_path": Code('data_root + "share-captioner_coco_lcs_sam_1246k_1107.json"'),
            "image_folder": Code('data_root + "data"'),
        }
    if parsed.stage == "pretrain":
        path, folder = "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "LLaVA-Pretrain/images"
    else:
        path, folder = "LLaVA-Instruct-150K/llava_v1_5_mix665k.json", "llava_images"
    return {
        "data_root": "./data/llava_data/",
        "data_path": Code(f'data_root + "{path}"'),
        "image_folder": Code(f'data_root + "{folder}"'),
    }


def _mixture() -> dict[str, Any]:
    """The settings of the InternVL mixture."""
    files = {
        "sharegpt4v_caption": ("sharegpt4v_instruct_gpt4-vision_cap100k.jsonl", "data"),
        "llava": ("llava_instruct_150k_zh.jsonl", "data/coco"),
        "sharegpt4v": ("sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.jsonl", "data"),
        "dvqa": ("dvqa_train_200k.jsonl", "data/dvqa"),
        "chartqa": ("chartqa_train_18k.jsonl", "data/chartqa"),
        "ai2d": ("ai2d_train_12k.jsonl", "data/ai2d"),
        "docvqa": ("docvqa_train_10k.jsonl", "data/docvqa"),
        "geoqa": ("geoqa+.jsonl", "data/geoqa+"),
        "synthdog": ("synthdog_en.jsonl", "data/synthdog-en"),
    }
    values: dict[str, Any] = {
        "max_length": Code("int(4096 - (336 / 14) ** 2)"),
        "data_root": "./data/internvl_sft/",
    }
    for name, (path, folder) in files.items():
        values[f"{name}_data_path"] = Code(f'data_root + "{path}"')
        values[f"{name}_image_folder"] = Code(f'data_root + "{folder}"')
    return values


def _model(parsed: LlavaName, values: Mapping[str, Any]) -> Fragment:
    weights = {"full": "full", "quant": "qlora", "qlora": "qlora"}.get(parsed.llm, "lora")
    llm = language_model(parsed.model, weights, "llm_name_or_path")
    lora = filled(part("lora"), lora_placeholders(values))
    visual_lora = part("visual_lora")
    adapters = parsed.llm in ("lora", "qlora")
    model = filled(
        part("model_llava"),
        {
            "FREEZE_LLM": literal(parsed.llm != "full"),
            "FREEZE_VISUAL": literal(parsed.visual != "full"),
            "PRETRAINED": {"pretrained_pth": "pretrained_pth"}
            if parsed.stage == "finetune"
            else {},
            "LLM": expression(llm),
            "LLM_LORA": {"llm_lora": expression(lora)} if adapters else {},
            "VISUAL_LORA": {"visual_encoder_lora": expression(visual_lora)}
            if parsed.visual == "lora"
            else {},
        },
    )
    return Fragment(model.text, {**llm.modules, **lora.modules, **model.modules})


def _data(parsed: LlavaName) -> list[Fragment]:
    grouped = parsed.stage == "finetune"
    loader = part("loader_grouped" if grouped else "loader_shuffled")
    if parsed.data != "internvl":
        return [
            _dataset("llava_dataset", "data_path", "image_folder", grouped),
            filled(loader, {"DATASET": "llava_dataset"}),
        ]
    blocks = [
        _dataset(f"{name}_dataset", f"{name}_data_path", f"{name}_image_folder", True)
        for name in INTERNVL_SETS
    ]
    variables = "".join(f"    {name}_dataset,\n" for name in INTERNVL_SETS)
    return [
        *blocks,
        filled(part("data_concat"), {"DATASETS": f"[\n{variables}]"}),
        filled(loader, {"DATASET": "train_dataset"}),
    ]


def _dataset(variable: str, path: str, folder: str, pad: bool) -> Fragment:
    placeholders = {"VARIABLE": variable, "PATH": path, "FOLDER": folder, "PAD": literal(pad)}
    return filled(part("data_llava"), placeholders)


def _hook() -> Fragment:
    return filled(
        part("hook_chat"),
        {
            "IMAGE_FIELDS": {
                "image_processor": "image_processor",
                "evaluation_images": "evaluation_images",
            },
            "HOOK_FIELDS": {},
            "PROMPT_TEMPLATE": {"prompt_template": "prompt_template"},
        },
    )
