"""Sample answers while training: when they are asked for, with which prompt, and where they end."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.engine.toy import run_with
from tests.helpers.image_text import image_text_folder, make_image
from tests.helpers.videos import load_with_videos, make_video
from xtuner.chat.image_text import ImageTextPrompt
from xtuner.chat.prompt import ChatImage, Turn
from xtuner.dataset.videos import FrameSampling
from xtuner.engine.hooks import EvaluateChatHook
from xtuner.tokenization.processor import load_processor
from xtuner.utils import PROMPT_TEMPLATE
from xtuner.utils.errors import UserError


def answers(runner) -> dict[str, str]:
    folder = Path(runner.log_dir) / "vis_data"
    return {file.name: file.read_text() for file in sorted(folder.glob("eval_outputs_*.txt"))}


def chat_hook(tokenizer, **settings) -> EvaluateChatHook:
    chosen = dict(evaluation_inputs=["What is this?"], max_new_tokens=4)
    return EvaluateChatHook(tokenizer=tokenizer, **(chosen | settings))


def test_it_asks_before_in_between_and_after(tmp_path, tokenizer, capsys):
    hook = chat_hook(
        tokenizer,
        prompt_template=PROMPT_TEMPLATE.internlm2_chat,
        every_n_iters=3,
        system="Be {x}.\x1b[2J",
    )
    runner = run_with(tmp_path, hook, accumulative_counts=2)
    assert list(answers(runner)) == [
        "eval_outputs_iter_0.txt",
        "eval_outputs_iter_3.txt",  # asked for at 3, served at the end of the step: iter 3 is done
        "eval_outputs_iter_5.txt",
        "eval_outputs_iter_8.txt",
    ]
    text = answers(runner)["eval_outputs_iter_8.txt"]
    assert "Be {x}." in text
    assert "What is this?" in text
    assert text.startswith("<s>")
    shown = capsys.readouterr().out
    assert "Be {x}.[2J" in shown and "\x1b" not in shown
    steps = re.findall(r"Sample output \(step (\d+)\):", shown)
    assert steps == ["0", "2", "3", "4"]
    assert runner.model.training


def test_the_prompt_is_the_one_of_training(tokenizer):
    hook = chat_hook(tokenizer, prompt_template="internlm2_chat", system='{"a": 1} {input}')
    assert tokenizer.decode(hook.prompt("Hello {round}")) == (
        '<s><|im_start|>system\n{"a": 1} {input}<|im_end|>\n'
        "<|im_start|>user\nHello {round}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_tokenizers_own_template(tokenizer):
    hook = chat_hook(tokenizer, prompt_template=PROMPT_TEMPLATE.auto, system="S")
    assert tokenizer.decode(hook.prompt("Q")) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    )


def test_arguments_reach_the_tokenizers_template(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}"
        "{% if enable_thinking is defined and not enable_thinking %}no thoughts{% endif %}"
    )
    for arguments, ending in ((None, "Q"), ({"enable_thinking": False}, "Qno thoughts")):
        hook = chat_hook(
            tokenizer, prompt_template=PROMPT_TEMPLATE.auto, template_arguments=arguments
        )
        assert tokenizer.decode(hook.prompt("Q")).endswith(ending)


def test_asking_leaves_the_training_as_it_is(tmp_path, tokenizer):
    asked = run_with(
        tmp_path / "asked",
        chat_hook(tokenizer, every_n_iters=1, generation_kwargs=dict(do_sample=True)),
    )
    silent = run_with(tmp_path / "silent")
    ours, theirs = asked.model.state_dict(), silent.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_hooks_share_no_stop_words(tokenizer):
    one, other = chat_hook(tokenizer), chat_hook(tokenizer)
    one.stop_words.append("X")
    assert other.stop_words == []


def test_a_stop_word_of_several_tokens_ends_an_answer(tokenizer):
    settings = chat_hook(tokenizer, stop_word="<eoa> and more")._settings(5, None)
    assert settings["stop_strings"] == ["<eoa> and more"]
    assert settings["eos_token_id"][0] == tokenizer.eos_token_id


def test_mistakes_in_its_settings_are_named(tokenizer):
    with pytest.raises(UserError, match="no prompt template 'internlm9'"):
        chat_hook(tokenizer, prompt_template="internlm9")
    with pytest.raises(UserError, match="2 evaluation_images for 1"):
        chat_hook(tokenizer, evaluation_images=["a.png", "b.png"])
    with pytest.raises(UserError, match="evaluation_videos need a processor"):
        chat_hook(tokenizer, evaluation_videos="a.mp4")
    gemma = load_processor(image_text_folder("gemma3"))
    with pytest.raises(UserError, match="Gemma3Processor takes no videos"):
        chat_hook(tokenizer, processor=gemma, evaluation_videos="a.mp4")


def test_questions_about_videos_are_those_of_chat(tmp_path):
    folder = image_text_folder("qwen2_5_vl")
    processor = load_with_videos(folder)
    video = str(make_video(tmp_path / "a.mp4", 9))
    image = tmp_path / "one.png"
    make_image(40, 28, 1).save(image)
    hook = chat_hook(
        processor.tokenizer,
        processor=processor,
        evaluation_inputs=["What happens?", "What is it?", "And this?", "And now?"],
        evaluation_images=[None, str(image), None, None],
        evaluation_videos=[video, None, [str(image)] * 3, str(tmp_path / "none.mp4")],
        video_frames=3,
    )
    assert hook._askable() == [0, 1, 2]
    prompt = ImageTextPrompt(processor.tokenizer, None, [], processor, frames=FrameSampling(3, 2.0))
    seen = [prompt.read_video(video), make_image(40, 28, 1), None]
    for number, visual in enumerate(seen[:2]):
        turns = [Turn(hook.inputs[number], images=(ChatImage(visual),))]
        ours = hook._model_inputs(number)
        assert ours["input_ids"][0].tolist() == prompt.ids(turns)
        for name, value in prompt.model_inputs(turns).items():
            assert torch.equal(ours[name], value)
    assert hook._model_inputs(2)["video_grid_thw"].tolist() == [[2, 2, 2]]
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    answer = hook._answer(model, torch.device("cpu"), 0, 4)
    assert answer.count(processor.video_token) == 1


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "smolvlm"])
def test_a_question_about_an_image_is_that_of_the_processor(kind, tmp_path, capsys):
    folder = image_text_folder(kind)
    processor = load_processor(folder)
    make_image(40, 28, 1).save(tmp_path / "one.png")
    hook = chat_hook(
        processor.tokenizer,
        processor=processor,
        evaluation_inputs=["What is it?", "And this?"],
        evaluation_images=[str(tmp_path / "one.png"), str(tmp_path / "none.png")],
    )
    assert hook._askable() == [0]  # the other image cannot be read
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    parts = [{"type": "image", "image": make_image(40, 28, 1)}]
    parts.append({"type": "text", "text": "What is it?"})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    settings = hook._settings(4, model.generation_config)
    wanted = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    answer = hook._answer(model, torch.device("cpu"), 0, 4)
    assert answer.endswith(processor.decode(wanted))
    assert answer.count(processor.image_token) <= answer.count("row_") + 1  # not each place of it
