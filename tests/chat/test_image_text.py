"""Prompts with images are those of the model's processor; chat shows the model every image."""

from __future__ import annotations

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.helpers.image_text import FAMILIES, image_text_folder, make_image
from tests.helpers.tiers import few_fast
from tests.helpers.videos import TAKE_VIDEOS, load_with_videos, make_video
from xtuner.chat import screen
from xtuner.chat.image_text import ImageTextPrompt
from xtuner.chat.prompt import ChatImage, Turn
from xtuner.chat.session import ChatSession, Sampling
from xtuner.dataset.images import ORIENTATION, decode_image
from xtuner.engine.hooks import EvaluateChatHook
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


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("videos") / "a video.mp4", 9)


@pytest.mark.parametrize("kind", few_fast(TAKE_VIDEOS, ("qwen2_5_vl", "llava_onevision")))
def test_prompts_with_videos_are_those_of_the_processor(kind, video):
    processor = load_with_videos(image_text_folder(kind))
    prompt = ImageTextPrompt(processor.tokenizer, None, [], processor)
    clip = prompt.read_video(str(video))
    stacks = kind in ("llava_onevision", "internvl")
    used = np.linspace(0, 8, 16).round() if stacks else (0, 3, 5, 8)
    assert list(clip.shape.used) == list(used)
    metadata = dict(total_num_frames=9, fps=4.0, duration=2.25, frames_indices=list(used))
    visuals = [clip]
    settings = dict(videos=[clip.array()], video_metadata=[metadata], do_sample_frames=False)
    if kind not in ("smolvlm", "glm4v"):
        visuals.append(make_image(40, 28, 1))
        settings["images"] = [visuals[1:]]
    parts = [{"type": "video"}, {"type": "image"}][: len(visuals)]
    content = [*parts, {"type": "text", "text": "What happens?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    theirs = processor(text=[text], add_special_tokens=False, return_tensors="pt", **settings)
    turns = [Turn("What happens?", images=tuple(map(ChatImage, visuals)))]
    assert prompt.ids(turns) == theirs["input_ids"][0].tolist()
    ours = prompt.model_inputs(turns)
    assert any("pixel_values" in name for name in ours)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])


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


def test_typed_with_videos(video, photo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("xtuner.tokenization.processor.load_processor", load_with_videos)
    folder = str(image_text_folder("qwen2_5_vl"))
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(3):
        make_image(40, 28, number).save(frames / f"{number}.png")
    saved = tmp_path / "saved.jsonl"
    lines = ["what?", f"/video '{frames}'", f"/image {photo}", "and this?", f"/save {saved}", ""]
    status, out, err = chat([folder, "--video", str(video)], "\n".join(lines), monkeypatch, capsys)
    assert status == 0 and out.count("assistant: ") == 2
    assert err.count("the next question is about") == 2
    (row,) = map(json.loads, saved.read_text("utf-8").splitlines())
    seen = [part for message in row["messages"] for part in message["content"]]
    assert [part for part in seen if "type" in part and part["type"] != "text"] == [
        {"type": "video", "video": str(video)},
        {"type": "video", "video": str(frames)},
        {"type": "image", "image": str(photo)},
    ]
    reasons = {
        "": "usage: /video FILE",
        "none.mp4": "the video cannot be read: No such file",
        str(saved): "the video cannot be read: is no video",
        str(tmp_path / "empty"): "the video cannot be read: is a folder without images",
    }
    (tmp_path / "empty").mkdir()
    typed = "".join(f"/video {name}\n" for name in reasons)
    _, _, err = chat([folder], typed, monkeypatch, capsys)
    assert [reason for reason in reasons.values() if reason not in err] == []
    smolvlm = str(image_text_folder("smolvlm"))
    words = [smolvlm, "--video", str(video), "--image", str(photo)]
    status, _, err = chat(words, "what?\n/clear\nhi\n", monkeypatch, capsys)
    assert status == 1 and "SmolVLMProcessor takes no images and videos in one conversation" in err


def test_photos_are_turned_as_in_training(tmp_path, capsys):
    file = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    make_image(40, 28, 1).save(file, exif=exif)
    prompt = prompt_of("qwen2_5_vl")
    session = ChatSession(None, prompt)
    screen._command(session, f"/image {file}", stream=False)
    hook = EvaluateChatHook(
        prompt.tokenizer,
        ["What?"],
        evaluation_images=[str(file)],
        processor=prompt.processor,
    )
    seen = [session.images[0].image, *hook._about(0)]
    assert [image.size for image in seen] == [decode_image(file).size] * 2 == [(28, 40)] * 2


def test_videos_for_a_model_without_them_are_refused(video, answering_model, monkeypatch, capsys):
    for folder, reason in (
        (str(answering_model), "this model takes no videos"),
        (str(image_text_folder("gemma3")), "Gemma3Processor takes no videos"),
    ):
        status, _, err = chat([folder, "--video", str(video)], "hi\n", monkeypatch, capsys)
        assert status == 1 and reason in err
        _, _, err = chat([folder], f"/video {video}\nexit\n", monkeypatch, capsys)
        assert reason in err


@pytest.mark.parametrize("kind", few_fast(FAMILIES, ("qwen3_5",)))
def test_every_family_answers_about_an_image(kind, photo, monkeypatch, capsys):
    words = [str(image_text_folder(kind)), "--image", str(photo)]
    status, out, err = chat(words, "what?\nand more?\n", monkeypatch, capsys)
    assert status == 0 and out.count("assistant: ") == 2, err


def test_an_adapter_says_which_class_it_is_of(photo, tmp_path, monkeypatch, capsys):
    """Qwen3.5 is loaded with its visual encoder or, by another class, without."""
    folder = image_text_folder("qwen3_5")
    for name, auto in (("seeing", AutoModelForImageTextToText), ("blind", AutoModelForCausalLM)):
        model = auto.from_pretrained(folder)
        get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(
            tmp_path / name
        )
        words = [str(folder), "--adapter", str(tmp_path / name)]
        status, out, _ = chat(words, "what?\n", monkeypatch, capsys)
        assert status == 0 and out.count("assistant: ") == 1
        status, _, err = chat([*words, "--image", str(photo)], "what?\n", monkeypatch, capsys)
        assert (status == 0) == (name == "seeing")
    assert "of the language model alone" in err


def test_what_cannot_be_shown_is_said(photo, answering_model, monkeypatch, capsys):
    folder = str(image_text_folder("qwen2_5_vl"))
    wrong = {
        "takes no images": [str(answering_model), "--image", str(photo)],
        "leave --prompt-template out": [
            *(folder, "--prompt-template", "vicuna", "--image", str(photo)),
        ],
        "none.png: the image cannot be read: No such file": [
            *(folder, "--image", str(photo.with_name("none.png"))),
        ],
        "the image cannot be read: is no image": [folder, "--image", str(folder) + "/config.json"],
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
