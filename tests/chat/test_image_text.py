"""Prompts with images are those of the model's processor; chat shows the model every image."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from tests.helpers.image_text import FAMILIES, image_text_folder, make_image
from xtuner.chat.image_text import ImageTextPrompt
from xtuner.chat.prompt import ChatImage, Turn
from xtuner.chat.session import ChatSession, Sampling
from xtuner.entry_point import main
from xtuner.tokenization.processor import load_processor
from xtuner.tools.chat_loading import load_for_chat


def prompt_of(kind: str) -> ImageTextPrompt:
    processor = load_processor(image_text_folder(kind))
    return ImageTextPrompt(processor.tokenizer, None, [], processor)


@pytest.mark.parametrize("kind", FAMILIES)
def test_prompts_are_those_of_the_processor(kind):
    prompt = prompt_of(kind)
    images = [make_image(40, 28, 1), make_image(28, 56, 2), make_image(28, 28, 3)]
    chat_images = [ChatImage(image) for image in images]
    turns = [
        Turn("Which of the two?", "The first.", tuple(chat_images[:2])),
        Turn("And this?", images=(chat_images[2],)),
    ]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": images[0]},
                {"type": "image", "image": images[1]},
                {"type": "text", "text": "Which of the two?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "The first."}]},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": images[2]},
                {"type": "text", "text": "And this?"},
            ],
        },
    ]
    theirs = prompt.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert prompt.ids(turns, "Be brief.") == theirs["input_ids"][0].tolist()
    ours = prompt.model_inputs(turns, "Be brief.")
    assert "pixel_values" in ours
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])


def test_the_model_sees_the_images_of_its_turn_and_of_earlier_ones():
    folder = image_text_folder("qwen2_5_vl")
    model, _ = load_for_chat(folder)
    prompt = prompt_of("qwen2_5_vl")
    seen = []
    forward = model.model.visual.forward

    def counting(*args, **kwargs):
        seen.append(len(kwargs["grid_thw"]) if "grid_thw" in kwargs else len(args[1]))
        return forward(*args, **kwargs)

    model.model.visual.forward = counting
    session = ChatSession(model, prompt, sampling=Sampling(max_new_tokens=2, temperature=0))
    session.attach(make_image(28, 28, 1))
    session.ask("one?")
    session.attach(make_image(28, 28, 2))
    session.attach(make_image(56, 28, 3))
    session.ask("two more?")
    session.ask("none?")
    assert seen == [1, 3, 3] and not session.images
    session.reset()
    session.ask("nothing to see?")
    assert len(seen) == 3


def chat(words, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    status = main(["chat", *words, "--max-new-tokens", "3", "--temperature", "0"])
    return status, *capsys.readouterr()


@pytest.fixture
def photo(tmp_path):
    file = tmp_path / "a photo.png"
    make_image(40, 28, 5).save(file)
    return file


def test_typed_with_an_adapter_images_and_a_saved_conversation(
    photo, tmp_path, monkeypatch, capsys
):
    folder = image_text_folder("qwen3_vl")
    adapter = tmp_path / "adapter"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    saved = tmp_path / "saved.jsonl"
    lines = ["what?", f"/image '{photo}'", "and this?", f"/save {saved}", "exit", ""]
    words = [str(folder), "--adapter", str(adapter), "--image", str(photo)]
    status, out, err = chat(words, "\n".join(lines), monkeypatch, capsys)
    assert status == 0 and out.count("assistant: ") == 2
    assert "the next question is about" in err
    (row,) = map(json.loads, saved.read_text("utf-8").splitlines())
    assert row["messages"][0]["content"] == [
        {"type": "image", "image": str(photo)},
        {"type": "text", "text": "what?"},
    ]


def test_what_cannot_be_shown_is_said(photo, answering_model, monkeypatch, capsys):
    folder = str(image_text_folder("qwen2_5_vl"))
    wrong = {
        "takes no images": [str(answering_model), "--image", str(photo)],
        "leave --prompt-template out": [
            *(folder, "--prompt-template", "vicuna", "--image", str(photo)),
        ],
        "the image cannot be read": [folder, "--image", str(photo.with_name("none.png"))],
    }
    for reason, words in wrong.items():
        status, _, err = chat(words, "hi\n", monkeypatch, capsys)
        assert status == 1 and reason in err
    _, _, err = chat([folder], "/image\n/image none.png\nexit\n", monkeypatch, capsys)
    assert "usage: /image FILE" in err and "the image cannot be read" in err
    _, _, err = chat([str(answering_model)], f"/image {photo}\nexit\n", monkeypatch, capsys)
    assert "takes no images" in err


def test_without_its_processor_a_model_chats_about_text(photo, tmp_path, monkeypatch, capsys):
    """Ministral 3's needs torchvision, SmolVLM's num2words."""
    folder = tmp_path / "vlm"
    shutil.copytree(image_text_folder("qwen2_5_vl"), folder)
    settings = folder / "preprocessor_config.json"
    settings.write_text(settings.read_text("utf-8").replace("Qwen2VLImage", "NoSuchImage"), "utf-8")
    status, out, err = chat([str(folder)], "hi\nexit\n", monkeypatch, capsys)
    assert status == 0 and out.count("assistant: ") == 1
    assert "text only, no images: the processor cannot be loaded" in err
    status, _, err = chat([str(folder), "--image", str(photo)], "hi\n", monkeypatch, capsys)
    assert status == 1 and "the processor cannot be loaded" in err
