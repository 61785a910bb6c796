"""From a folder of photos and rows about them to answers in chat, by the printed commands."""

from __future__ import annotations

import io
import json
import random
import shlex
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from tests.e2e.test_own_code import say
from tests.e2e.test_printed_commands import PRINTED
from tests.helpers.image_text import save_image_text
from tests.helpers.videos import load_with_videos
from xtuner.config.check.checker import check
from xtuner.dataset.vision_language.image_prompt import encode_image_prompt, user_message
from xtuner.tokenization.processor import load_processor

COLORS = {"red": (220, 20, 20), "blue": (20, 20, 220)}
ONE, TWO = "What color?", "Which one is red?"


def save_photo(file: Path, color: str, seed: int) -> str:
    draw = random.Random(seed)
    shade = tuple(value + draw.randint(-20, 20) for value in COLORS[color])
    Image.new("RGB", (56, 56), shade).save(file)
    return file.name


def image_row(question: str, images: list[str], answer: str) -> dict[str, object]:
    messages = [
        {"role": "user", "content": "<image>" * len(images) + question},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "images": images}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, and rows of one image and of two in a folder of photos."""
    place = tmp_path_factory.mktemp("我的 photos")
    save_image_text(place / "vlm", "qwen2_5_vl")
    photos = place / "photos"
    photos.mkdir()
    rows = []
    for number in range(24):
        names = {
            color: save_photo(photos / f"{color}{number}.png", color, number) for color in COLORS
        }
        rows += [image_row(ONE, [name], color) for color, name in names.items()]
        both = [names["red"], names["blue"]]
        rows += [image_row(TWO, both, "first"), image_row(TWO, both[::-1], "second")]
    lines = (json.dumps(row) + "\n" for row in rows)
    (photos / "rows.jsonl").write_text("".join(lines), "utf-8")
    return place


def answers_of(folder: Path, photos: Path) -> list[str]:
    """What stock transformers answers."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = load_processor(folder)
    red, blue = (Image.open(photos / f"{color}3.png") for color in COLORS)
    said = []
    for question, images in ((ONE, [red]), (ONE, [blue]), (TWO, [red, blue]), (TWO, [blue, red])):
        inputs = encode_image_prompt(processor, [user_message(question, images)], images)
        answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        new = answer[0, inputs["input_ids"].shape[1] :]
        said.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return said


def run_printed(capsys, monkeypatch, said: str) -> tuple[str, Path]:
    """Run the commands that ``train`` printed; what chat shows, and the folder that it loads."""
    *commands, chat = (shlex.split(command)[1:] for command in PRINTED.findall(said))
    for words in commands:
        say(capsys, *words)
    lines = [ONE, "/clear", "/image photos/blue5.png", ONE, "exit"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    shown = say(capsys, *chat, "--image", "photos/red5.png", "--temperature", "0")
    return shown, Path(chat[1])


def test_photos_become_answers(place, capsys, monkeypatch):
    """All weights; then an adapter on the result learns to say the other color."""
    monkeypatch.chdir(place)
    words = ["--model", "vlm", "--method", "full", "--data", "photos/rows.jsonl", "."]
    (train,) = PRINTED.findall(say(capsys, "copy-cfg", *words))
    assert check(shlex.split(train)[2]) == []
    options = ["dataloader_num_workers=0", "accumulative_counts=1", "freeze_projector=False"]
    packed = ["pack_to_max_length=True", "use_varlen_attn=True", "max_length=160"]
    words = [*shlex.split(train)[1:], "--cfg-options", *options]
    said = say(capsys, *words, *packed, "lr=2e-3", "max_epochs=4")
    shown, folder = run_printed(capsys, monkeypatch, said)
    assert shown.index("assistant: red\n") < shown.index("assistant: blue\n")
    assert answers_of(folder, place / "photos") == ["red", "blue", "first", "second"]

    rows = [json.loads(line) for line in (place / "photos/rows.jsonl").read_text().splitlines()]
    swapped = [row for row in rows if len(row["images"]) == 1]
    for row in swapped:
        (answer,) = (message for message in row["messages"] if message["role"] == "assistant")
        answer["content"] = "blue" if answer["content"] == "red" else "red"
    lines = "".join(json.dumps(row) + "\n" for row in swapped)
    (place / "photos/swapped.jsonl").write_text(lines, "utf-8")
    words = ["--model", str(folder), "--method", "lora", "--data", "photos/swapped.jsonl", "."]
    (train,) = PRINTED.findall(say(capsys, "copy-cfg", *words))
    words = [*shlex.split(train)[1:], "--cfg-options", *options, "batch_size=4"]
    shown, folder = run_printed(capsys, monkeypatch, say(capsys, *words, "lr=1e-2", "max_epochs=4"))
    assert shown.index("assistant: blue\n") < shown.index("assistant: red\n")
    assert answers_of(folder, place / "photos")[:2] == ["blue", "red"]


def save_video(file: Path, color: str, seed: int) -> str:
    """A second in one color."""
    draw = random.Random(seed)
    shade = [value + draw.randint(-20, 20) for value in COLORS[color]]
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"mp4v"), 4, (56, 56))
    for _ in range(4):
        writer.write(np.full((56, 56, 3), shade[::-1], dtype=np.uint8))
    writer.release()
    return file.name


def test_videos_become_answers(tmp_path, capsys, monkeypatch):
    """What the model said at the end of its training chat says with the adapter, and merged."""
    monkeypatch.setattr("xtuner.tokenization.processor.load_processor", load_with_videos)
    monkeypatch.chdir(tmp_path)
    save_image_text(tmp_path / "vlm", "qwen2_5_vl")
    (tmp_path / "videos").mkdir()
    rows = []
    for number in range(12):
        for color in COLORS:
            name = save_video(tmp_path / "videos" / f"{color}{number}.mp4", color, number)
            row = image_row(ONE, [], color) | {"videos": [name]}
            row["messages"][0]["content"] = f"<video>{ONE}"
            rows.append(row)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "videos/rows.jsonl").write_text(lines, "utf-8")
    words = ["--model", "vlm", "--method", "lora", "--data", "videos/rows.jsonl", "."]
    (train,) = PRINTED.findall(say(capsys, "copy-cfg", *words))
    assert check(shlex.split(train)[2]) == []
    options = ["dataloader_num_workers=0", "accumulative_counts=1", "batch_size=4", "lr=1e-2"]
    words = [*shlex.split(train)[1:], "--cfg-options", *options, "max_epochs=8"]
    said = say(capsys, *words, "freeze_projector=False")
    *_, red, blue = said.split("Sample output")
    assert ("red" in red, "blue" in red, "red" in blue, "blue" in blue) == (
        True,
        False,
        False,
        True,
    )
    convert, merge, chat = (shlex.split(each)[1:] for each in PRINTED.findall(said))
    say(capsys, *convert)
    say(capsys, *merge)
    lines = [ONE, "/clear", "/video videos/blue5.mp4", ONE, "exit"]
    for model in (convert[-1], chat[1]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        words = ["chat", model, "--video", "videos/red5.mp4", "--temperature", "0"]
        shown = say(capsys, *words)
        assert shown.index("assistant: red\n") < shown.index("assistant: blue\n")
