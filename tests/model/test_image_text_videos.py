"""Rows with videos against the plain classes on the processor's own batch: loss and gradients."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from datasets import load_dataset
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from PIL import Image

from tests.helpers.image_text import image_text_folder, make_image, plain_image_text
from tests.helpers.support import require_same
from tests.helpers.tiers import few_fast, slow
from tests.helpers.videos import TAKE_VIDEOS, load_with_videos, make_video
from xtuner.dataset import VisionLanguageDataset
from xtuner.dataset.collate_fns import vision_language_collate_fn
from xtuner.model import VisionLanguageFinetune
from xtuner.proving.training import Trained, move_adapter, plain_training, train_on

FRAMES = 4
VIDEOS = {"a.mp4": (9, (56, 28), 4.0), "b.mp4": (6, (64, 48), 2.0)}
"""Frames, size and frames per second of each file."""


def row(question: str, answer: str, images: tuple[str, ...] = (), videos: tuple[str, ...] = ()):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": list(images), "videos": list(videos)}


ROWS = [
    row("<video>What?", "zap", videos=("a.mp4",)),
    row("Look at <video> and <video>", "zo", videos=("b.mp4", "a.mp4")),
    row("<image>or<video>", "zip zip", images=("0.png",), videos=("b.mp4",)),
    row("Say hello", "hello"),
    row("<image>And this?", "zu", images=("1.png",)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos, photos and rows about them."""
    folder = tmp_path_factory.mktemp("videos")
    for name, (frames, size, fps) in VIDEOS.items():
        make_video(folder / name, frames, size, fps)
    for number in range(2):
        make_image(40, 30, number).save(folder / f"{number}.png")
    return folder


@functools.cache
def processor_of(kind: str) -> Any:
    return load_with_videos(image_text_folder(kind))


def decoded(file: Path) -> tuple[Any, dict[str, Any]]:
    """Four frames from the first to the last, and what processors are told about them."""
    frames, size, fps = VIDEOS[file.name]
    capture = cv2.VideoCapture(str(file))
    every = [capture.read()[1][:, :, ::-1] for _ in range(frames)]
    indices = np.linspace(0, frames - 1, FRAMES).round().astype(int).tolist()
    known = {"width": size[0], "height": size[1], "duration": frames / fps, "fps": fps}
    return np.stack([every[index] for index in indices]), {
        **known,
        "total_num_frames": frames,
        "frames_indices": indices,
    }


def own_batch(processor: Any, folder: Path, each: dict[str, Any]) -> dict[str, Any]:
    """The processor's own batch of one row."""
    ask, answer = each["messages"]
    pieces = ask["content"].replace("<", "|<").replace(">", ">|").split("|")
    known = {"<image>": "image", "<video>": "video"}
    parts = [
        {"type": known[piece]} if piece in known else {"type": "text", "text": piece}
        for piece in pieces
        if piece
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": answer["content"]}]}
    text = processor.apply_chat_template([{"role": "user", "content": parts}, answer])
    videos = [decoded(folder / name) for name in each["videos"]]
    settings: dict[str, Any] = {}
    if videos:
        settings = {
            "videos": [array for array, _ in videos],
            "video_metadata": [metadata for _, metadata in videos],
            "do_sample_frames": False,
        }
    images = [[Image.open(folder / name) for name in each["images"]]] if each["images"] else None
    return dict(processor(text=[text], images=images, return_tensors="pt", **settings))


def rows_of(kind: str) -> list[dict[str, Any]]:
    """Of these two classes none takes a row with both images and videos."""
    takes_both = kind not in ("smolvlm", "glm4v")
    return [each for each in ROWS if takes_both or not (each["images"] and each["videos"])]


def dataset_of(kind: str, folder: Path, **settings: Any) -> VisionLanguageDataset:
    file = folder / f"{kind}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows_of(kind))), "utf-8")
    source = dict(type=load_dataset, path="json", data_files=str(file))
    settings = {"pack_to_max_length": False, "video_frames": FRAMES, "bad_rows": "error"} | settings
    return VisionLanguageDataset(source, processor_of(kind), 4096, **settings)


def of_transformers(kind: str, folder: Path, llm: Any, rows: Any) -> Trained:
    """Each row alone by a class of transformers, in its processor's own batch."""
    samples = [
        {"batch": own_batch(processor_of(kind), folder, each), "labels": made["labels"]}
        for each, made in zip(rows_of(kind), rows, strict=True)
    ]
    for sample, made in zip(samples, rows, strict=True):
        assert sample["batch"]["input_ids"][0].tolist() == list(made["input_ids"])
    return plain_training(llm, samples, lambda sample: sample["batch"])


@pytest.mark.parametrize("kind", few_fast(TAKE_VIDEOS, ("qwen2_5_vl", "smolvlm", "gemma4")))
def test_loss_and_gradients_equal_the_plain_class(kind, folder):
    data = dataset_of(kind, folder)
    rows = [data[index] for index in range(len(data))]
    wanted = of_transformers(kind, folder, plain_image_text(kind), rows)
    assert wanted.loss > 3
    for packed in (False, True):
        model = VisionLanguageFinetune(
            plain_image_text(kind, attn_implementation="sdpa"),
            processor=processor_of(kind),
            use_varlen_attn=packed,
            freeze_visual_encoder=False,
            freeze_projector=False,
            use_activation_checkpointing=packed,
        ).train(packed)
        batch = vision_language_collate_fn(rows, processor_of(kind), use_varlen_attn=packed)
        require_same(train_on(model, [batch["data"]]), wanted)


@pytest.mark.parametrize("packed", [True, slow(False)])
@pytest.mark.parametrize("kind", few_fast(TAKE_VIDEOS, ("qwen3_vl", "internvl")))
def test_an_adapter_on_videos_is_pefts_on_the_plain_class(kind, packed, folder):
    data = dataset_of(kind, folder)
    rows = [data[index] for index in range(len(data))]
    model = VisionLanguageFinetune(
        plain_image_text(kind, attn_implementation="sdpa"),
        processor=processor_of(kind),
        use_varlen_attn=packed,
        use_activation_checkpointing=packed,
        lora={"type": LoraConfig, "r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM"},
    ).train(packed)
    move_adapter(model)
    batch = vision_language_collate_fn(rows, processor_of(kind), use_varlen_attn=packed)
    found = train_on(model, [batch["data"]])
    plain = get_peft_model(plain_image_text(kind), model.llm.peft_config["default"]).eval()
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model.llm))
    wanted = of_transformers(kind, folder, plain, rows)
    assert found.gradients and all("lora" in name for name in found.gradients)
    require_same(found, wanted)
