"""Tiny random vision-language models and their processors, in folders as the hub has them.

``save_image_text(folder, family)`` writes one of ``FAMILIES``; an image becomes 1 to 12 tokens (70
with Gemma 4, whose processor knows no smaller number).
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import is_torchvision_available

from tests.helpers.architectures import BASE, DELTA_NET, SETTINGS, WINDOWS
from tests.helpers.tiny import make_tokenizer
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.proving.training import Trained, plain_training

VOCABULARY = 576
"""Rows of the embeddings: 512 of the tokenizer, the family's special tokens, and spare ones."""
SIDE = 28
"""Pixels of a side of the images whose processor resizes to one size."""

CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMAGE>{% elif part['type'] == 'video' %}<VIDEO>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
)
TEMPLATE = (
    "<PREFIX>{% for message in messages %}"
    "{% if message['role'] == 'user' %}<USER>{% elif message['role'] == 'assistant' %}<ASSISTANT>"
    "{% else %}<SYSTEM>{% endif %}<CONTENT>"
    "{% if message['role'] == 'user' %}<USER_END>{% else %}<END>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<ASSISTANT>{% endif %}"
)
CHATML = {
    "SYSTEM": "<|im_start|>system\n",
    "USER": "<|im_start|>user\n",
    "ASSISTANT": "<|im_start|>assistant\n",
    "USER_END": "<|im_end|>\n",
    "END": "<|im_end|>\n",
}
GEMMA = {
    "PREFIX": "{{ bos_token }}",
    "SYSTEM": "<start_of_turn>user\n",
    "USER": "<start_of_turn>user\n",
    "ASSISTANT": "<start_of_turn>model\n",
    "USER_END": "<end_of_turn>\n",
    "END": "<end_of_turn>\n",
}


OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
"""What a processor's batch has beside images."""
Sample = tuple[str, list[Any]]
"""The text of a chat, and its images."""


@dataclass(frozen=True)
class Family:
    """What the folder of a family of models has.

    Args:
        processor: class of the processor.
        image_processor: class and settings of the image processor.
        template: the parts of ``TEMPLATE``.
        named_tokens: special tokens that the tokenizer has attributes for.
        tokens: further special tokens.
        text: settings of the language model, beside ``BASE``.
        vision: settings of the vision tower.
        config: settings of the whole model; a value that names a token becomes its id.
        settings: of the processor itself.
        video: class of the video processor; None where there is none.
        others: further parts in ``processor_config.json``.
    """

    processor: str
    image_processor: tuple[str, dict[str, Any]]
    template: dict[str, str]
    text: dict[str, Any]
    vision: dict[str, Any]
    config: dict[str, Any]
    named_tokens: dict[str, str] = field(default_factory=dict)
    tokens: Sequence[str] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    video: str | None = None
    others: dict[str, Any] = field(default_factory=dict)


QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
QWEN_TEMPLATE = {
    **CHATML,
    "IMAGE": "<|vision_start|><|image_pad|><|vision_end|>",
    "VIDEO": "<|vision_start|><|video_pad|><|vision_end|>",
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": BASE["hidden_size"],
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 7,
}
THREE_DIMENSIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def _pixels(patch: int, merge: int = 2) -> dict[str, Any]:
    """Settings of an image processor of Qwen's kind: 1 to 4 tokens an image."""
    token = (patch * merge) ** 2
    return {
        "patch_size": patch,
        "merge_size": merge,
        "temporal_patch_size": 2,
        "min_pixels": token,
        "max_pixels": 4 * token,
    }


FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(
        processor="Qwen2_5_VLProcessor",
        image_processor=("Qwen2VLImageProcessor", _pixels(14)),
        video="Qwen2VLVideoProcessor",
        template=QWEN_TEMPLATE,
        tokens=QWEN_TOKENS,
        text={"model_type": "qwen2_5_vl_text", "rope_parameters": THREE_DIMENSIONS},
        vision={**QWEN_VISION, "patch_size": 14, "window_size": 28, "fullatt_block_indexes": [1]},
        config=QWEN_IDS,
    ),
    "qwen3_vl": Family(
        processor="Qwen3VLProcessor",
        image_processor=("Qwen2VLImageProcessorFast", _pixels(16)),
        video="Qwen3VLVideoProcessor",
        template=QWEN_TEMPLATE,
        tokens=QWEN_TOKENS,
        text={
            "model_type": "qwen3_vl_text",
            "rope_parameters": {**THREE_DIMENSIONS, "mrope_interleaved": True},
        },
        vision={
            **QWEN_VISION,
            "patch_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        config=QWEN_IDS,
    ),
    "qwen3_5": Family(
        processor="Qwen3VLProcessor",
        image_processor=("Qwen2VLImageProcessorFast", _pixels(16)),
        video="Qwen3VLVideoProcessor",
        template=QWEN_TEMPLATE,
        tokens=QWEN_TOKENS,
        text={
            "model_type": "qwen3_5_text",
            **DELTA_NET,
            "rope_parameters": {
                **THREE_DIMENSIONS,
                "mrope_interleaved": True,
                "partial_rotary_factor": 1.0,
            },
        },
        vision={**QWEN_VISION, "patch_size": 16, "num_position_embeddings": 16},
        config=QWEN_IDS,
    ),
    "gemma3": Family(
        processor="Gemma3Processor",
        image_processor=("Gemma3ImageProcessor", {"size": {"height": SIDE, "width": SIDE}}),
        template={**GEMMA, "IMAGE": "<start_of_image>"},
        named_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        tokens=("<start_of_turn>", "<end_of_turn>"),
        text={"model_type": "gemma3_text", **WINDOWS, "query_pre_attn_scalar": 16},
        vision=SIGLIP,
        config={
            "mm_tokens_per_image": 4,
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
            "image_token_index": "<image_soft_token>",
        },
        settings={"image_seq_length": 4},
    ),
    "gemma4": Family(
        processor="Gemma4Processor",
        image_processor=(
            "Gemma4ImageProcessor",
            {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70},
        ),
        video="Gemma4VideoProcessor",
        template={**GEMMA, "IMAGE": "<|image|>", "VIDEO": "<|video|>"},
        named_tokens={
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "image_token": "<|image|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
            "audio_token": "<|audio|>",
        },
        tokens=("<start_of_turn>", "<end_of_turn>", "<|video|>"),
        text={
            "model_type": "gemma4_text",
            **SETTINGS["gemma4_text"],
            "vocab_size_per_layer_input": VOCABULARY,
            "use_bidirectional_attention": "vision",
        },
        vision={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 256,
        },
        config={
            "audio_config": None,
            "boi_token_id": "<|image>",
            "eoi_token_id": "<image|>",
            "image_token_id": "<|image|>",
            "video_token_id": "<|video|>",
            "boa_token_id": "<|audio>",
            "eoa_token_index": "<audio|>",
            "audio_token_id": "<|audio|>",
        },
        settings={"image_seq_length": 70},
        others={"feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"}},
    ),
    "internvl": Family(
        processor="InternVLProcessor",
        image_processor=(
            "GotOcr2ImageProcessorFast",
            {
                "size": {"height": SIDE, "width": SIDE},
                "crop_to_patches": True,
                "min_patches": 1,
                "max_patches": 2,
            },
        ),
        video="InternVLVideoProcessor",
        template={**CHATML, "IMAGE": "<IMG_CONTEXT>\n", "VIDEO": "<video>\n"},
        named_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        text={"model_type": "qwen2"},
        vision={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [SIDE, SIDE],
            "patch_size": [7, 7],
        },
        config={"image_token_id": "<IMG_CONTEXT>", "image_seq_length": 4},
        settings={"image_seq_length": 4},
    ),
    "llava_onevision": Family(
        processor="LlavaOnevisionProcessor",
        image_processor=(
            "LlavaOnevisionImageProcessor",
            {
                "size": {"height": SIDE, "width": SIDE},
                "image_grid_pinpoints": [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
            },
        ),
        video="LlavaOnevisionVideoProcessor",
        template={**CHATML, "IMAGE": "<image>", "VIDEO": "<video>"},
        tokens=("<image>", "<video>"),
        text={"model_type": "qwen2"},
        vision={**SIGLIP, "patch_size": 14, "vision_use_head": False},
        config={
            "image_token_index": "<image>",
            "video_token_index": "<video>",
            "image_grid_pinpoints": [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
        },
        settings={
            "num_image_tokens": 4,
            "vision_feature_select_strategy": "full",
            "image_token": "<image>",
            "video_token": "<video>",
        },
    ),
    "smolvlm": Family(
        processor="SmolVLMProcessor",
        image_processor=(
            "SmolVLMImageProcessor",
            {
                "size": {"longest_edge": 2 * SIDE},
                "max_image_size": {"longest_edge": SIDE},
                "do_image_splitting": True,
            },
        ),
        video="SmolVLMVideoProcessor",
        template={
            "PREFIX": "<|im_start|>",
            "SYSTEM": "System: ",
            "USER": "User: ",
            "ASSISTANT": "Assistant: ",
            "USER_END": "<end_of_utterance>\n",
            "END": "<end_of_utterance>\n",
            "IMAGE": "<image>",
            "VIDEO": "<video>",
        },
        tokens=(
            "<fake_token_around_image>",
            "<image>",
            "<end_of_utterance>",
            "<global-img>",
            *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
        ),
        text={"model_type": "llama"},
        vision={**SIGLIP, "model_type": "smolvlm_vision"},
        config={"image_token_id": "<image>", "scale_factor": 2},
        settings={"image_seq_len": 4},
    ),
    "mistral3": Family(
        processor="PixtralProcessor",
        image_processor=(
            "PixtralImageProcessorFast",
            {"size": {"longest_edge": 56}, "patch_size": {"height": 14, "width": 14}},
        ),
        template={
            "PREFIX": "{{ bos_token }}",
            "SYSTEM": "[SYSTEM_PROMPT]",
            "USER": "[INST]",
            "ASSISTANT": "",
            "USER_END": "[/INST]",
            "END": "{{ eos_token }}",
            "IMAGE": "[IMG]",
        },
        tokens=("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "[SYSTEM_PROMPT]"),
        text={"model_type": "mistral", "sliding_window": None},
        vision={
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 16,
            "image_size": 56,
            "patch_size": 14,
        },
        config={"image_token_index": "[IMG]", "spatial_merge_size": 2},
        settings={"patch_size": 14, "spatial_merge_size": 2},
    ),
    "glm4v": Family(
        processor="Glm4vProcessor",
        image_processor=(
            "Glm4vImageProcessor",
            {
                "patch_size": 14,
                "merge_size": 2,
                "temporal_patch_size": 2,
                "size": {"shortest_edge": 2 * 28 * 28, "longest_edge": 2 * 56 * 56},
            },
        ),
        video="Glm4vVideoProcessor",
        template={
            "PREFIX": "[gMASK]<sop>",
            "SYSTEM": "<|system|>\n",
            "USER": "<|user|>\n",
            "ASSISTANT": "<|assistant|>\n",
            "USER_END": "",
            "END": "",
            "IMAGE": "<|begin_of_image|><|image|><|end_of_image|>",
            "VIDEO": "<|begin_of_video|><|video|><|end_of_video|>",
        },
        tokens=(
            *("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|image|>"),
            *("<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>"),
            "<|end_of_video|>",
        ),
        text={
            "model_type": "glm4v_text",
            "rope_parameters": {
                **THREE_DIMENSIONS,
                "mrope_section": [2, 3, 3],
                "partial_rotary_factor": 1.0,
            },
        },
        vision={
            **QWEN_VISION,
            "patch_size": 14,
            "image_size": 56,
            "out_hidden_size": BASE["hidden_size"],
            "intermediate_size": 64,
        },
        config={
            "image_token_id": "<|image|>",
            "video_token_id": "<|video|>",
            "image_start_token_id": "<|begin_of_image|>",
            "image_end_token_id": "<|end_of_image|>",
            "video_start_token_id": "<|begin_of_video|>",
            "video_end_token_id": "<|end_of_video|>",
        },
    ),
}
"""By ``model_type``: the ten families that must work."""


@functools.cache
def image_text_folder(kind: str, seed: int = 0) -> Path:
    """The folder of a family, made once a session; nothing may be written there."""
    root = Path(tempfile.mkdtemp(prefix="image-text-"))
    return save_image_text(root / kind, kind, seed)


def save_image_text(folder: Path, kind: str, seed: int = 0) -> Path:
    """Save a tiny random model and its processor.

    Args:
        folder: made where it does not exist.
        kind: a key of ``FAMILIES``.
        seed: of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = save_processor(folder, kind)
    make_image_text(kind, tokenizer, seed).save_pretrained(folder)
    return folder


def make_image_text(kind: str, tokenizer: Any, seed: int = 0) -> Any:
    """Make the model with random weights; none of them is all zeros."""
    family = FAMILIES[kind]
    ids = tokenizer.get_vocab()
    text = {**BASE, "vocab_size": VOCABULARY, **family.text}
    settings = {
        name: ids.get(value, value) if isinstance(value, str) else value
        for name, value in family.config.items()
    }
    config = AutoConfig.for_model(
        kind, text_config=text, vision_config=family.vision, tie_word_embeddings=False, **settings
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        for weight in model.parameters():
            if not weight.any():
                nn.init.normal_(weight, std=0.02)
    return model


def save_processor(folder: Path, kind: str) -> Any:
    """Write the files of a family's processor; returns the tokenizer."""
    family = FAMILIES[kind]
    tokenizer = make_tokenizer(chat_template=None)
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        **tokenizer.special_tokens_map,
        extra_special_tokens=[*tokenizer.extra_special_tokens, *family.tokens],
        model_specific_special_tokens=family.named_tokens,
    )
    tokenizer.save_pretrained(folder)
    parts = {**CHATML, "PREFIX": "", "IMAGE": "", "VIDEO": "", **family.template}
    template = TEMPLATE.replace("<CONTENT>", CONTENT)
    for name, value in parts.items():
        template = template.replace(f"<{name}>", value)
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    image_class, settings = family.image_processor
    image = {"image_processor_type": image_class, **settings}
    video = {"video_processor_type": family.video, **settings}
    named = {"processor_class": family.processor}
    if family.others:  # all parts in one file, as transformers 5 writes them
        whole = {**named, **family.settings, **family.others, "image_processor": image}
        _write(folder / "processor_config.json", {**whole, "video_processor": video})
        return tokenizer
    _write(folder / "preprocessor_config.json", {**named, **image})
    if family.video:
        _write(folder / "video_preprocessor_config.json", {**named, **video})
    if family.settings:
        _write(folder / "processor_config.json", {**named, **family.settings})
    return tokenizer


def _use_images_alone() -> None:
    """Let the processors of SmolVLM and Pixtral be imported without libraries for videos.

    The first wants num2words, for videos alone; the second imports a function from the module of
    its torchvision image processor that the PIL one has, too.
    """
    from transformers.models import pixtral
    from transformers.models.smolvlm import processing_smolvlm

    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    if is_torchvision_available():
        return
    name = "transformers.models.pixtral.image_processing_pixtral"
    sys.modules[name] = importlib.import_module(name.replace("processing", "processing_pil"))
    processing = importlib.import_module("transformers.models.pixtral.processing_pixtral")
    del sys.modules[name]
    pixtral.PixtralProcessor = processing.PixtralProcessor


_use_images_alone()


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def make_image(width: int, height: int, seed: int) -> Any:
    """An image of random blocks of color."""
    from PIL import Image

    random = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (4, 4, 3), generator=random, dtype=torch.uint8)
    image = Image.fromarray(blocks.numpy(), "RGB")
    return image.resize((width, height), Image.Resampling.NEAREST)


def own_loss(processor: Any, model: Any, samples: Sequence[Sample]) -> Trained:
    """The mean loss over all labelled tokens, each sample alone, by a class of transformers."""
    rows = [{"batch": processed(processor, [sample])} for sample in samples]
    for row in rows:
        row["labels"] = labels_of(processor, row["batch"]["input_ids"][0])
    return plain_training(model, rows, lambda row: row["batch"])


def plain_image_text(kind: str, **settings: Any) -> Any:
    """The class of transformers, without anything of XTuner's."""
    settings = {"attn_implementation": "eager", **settings}
    return AutoModelForImageTextToText.from_pretrained(image_text_folder(kind), **settings).eval()


def samples_of(processor: Any) -> list[Sample]:
    """A chat with an image, one without, and one with two images of other sizes."""
    image = {"type": "image"}
    chats = [
        ([image, _text("What is it?")], "a square", [make_image(56, 28, 1)]),
        ([_text("Say hello.")], "hello", []),
        ([image, _text("or "), image], "two", [make_image(28, 28, 2), make_image(28, 56, 3)]),
    ]
    found: list[Sample] = []
    for content, answer, images in chats:
        chat = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [_text(answer)]},
        ]
        found.append((processor.apply_chat_template(chat, tokenize=False), images))
    return found


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def processed(processor: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    """The processor's own batch: padded rows, all of them with images or none."""
    images = [each for _, each in samples if each] or None
    texts = [text for text, _ in samples]
    batch = processor(
        images=images, text=texts, padding=True, padding_side="right", return_tensors="pt"
    )
    return dict(batch)


def labels_of(processor: Any, ids: torch.Tensor) -> torch.Tensor:
    """All tokens of a sample but those of its images."""
    types = torch.tensor(processor.create_mm_token_type_ids(ids[None].tolist()))[0]
    return ids.masked_fill(types != 0, -100)


def collated(processor: Any, samples: Sequence[Sample], *, packed: bool) -> dict[str, Any]:
    """One batch of the samples, as ``VisionLanguageFinetune`` takes it."""
    ids = [processed(processor, [sample])["input_ids"][0] for sample in samples]
    rows = [{"input_ids": each, "labels": labels_of(processor, each)} for each in ids]
    data: dict[str, Any] = default_collate_fn(rows, use_varlen_attn=packed)["data"]
    data["images_per_sample"] = [len(images) for _, images in samples]
    types = processor.create_mm_token_type_ids(data["input_ids"].tolist())
    data["mm_token_type_ids"] = torch.tensor(types)
    seen = [sample for sample in samples if sample[1]]
    if seen:  # not by processor.image_processor: processors change its settings at a call
        whole = processed(processor, seen)
        data["images"] = {name: whole[name] for name in whole.keys() - OF_TEXT}
    return data
