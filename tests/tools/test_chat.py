"""`xtuner chat`: what a user sees, from a pipe and on a terminal."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.answering import ANSWER, QUESTIONS
from tests.helpers.forked import LIMIT
from tests.helpers.tiny import save_tiny
from xtuner.entry_point import main
from xtuner.export.fingerprint import write_fingerprint
from xtuner.export.weights import Weights

TEMPLATE = ["--prompt-template", "internlm2_chat"]


@pytest.fixture
def model_folder(answering_model) -> Path:
    return answering_model


def ask(words: list[str], text: str, monkeypatch, capsys) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    status = main(["chat", *words])
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.parametrize("extra", [[], ["--no-streamer"], ["--torch-dtype", "fp32"]])
def test_a_pipe_gets_the_answer_without_stop_words(extra, model_folder, monkeypatch, capsys):
    text = f"{QUESTIONS[1]}\nexit\nnever asked\n"
    status, out, err = ask([str(model_folder), *TEMPLATE, *extra], text, monkeypatch, capsys)
    assert status == 0
    assert out == f"user: {QUESTIONS[1]}\nassistant: {ANSWER}\n"
    assert "prompt template" in err


@pytest.mark.slow
def test_as_typed_in_a_shell(model_folder):
    command = [sys.executable, "-m", "xtuner", "chat", str(model_folder), *TEMPLATE]
    done = subprocess.run(
        command, input=f"{QUESTIONS[1]}\nexit\n", capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    assert ANSWER in done.stdout and "<|im_end|>" not in done.stdout


def test_without_a_template_the_tokenizers_own_is_used(model_folder, monkeypatch, capsys):
    _, out, err = ask([str(model_folder)], f"{QUESTIONS[0]}\n", monkeypatch, capsys)
    assert "the tokenizer's chat template" in err
    assert out.startswith(f"user: {QUESTIONS[0]}\nassistant: ")


@pytest.mark.parametrize("arguments", [[], ["--template-arguments", "enable_thinking=False"]])
def test_arguments_reach_the_tokenizers_template(
    arguments, tmp_path, model_folder, monkeypatch, capsys
):
    """The prompt, as the model gets it."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if enable_thinking is defined and not enable_thinking %}no thoughts{% endif %}"
    )
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts = []
    generate = type(model).generate

    def record(self, inputs=None, **settings):
        ids = settings["input_ids"] if inputs is None else inputs
        prompts.append(tokenizer.decode(ids[0]))
        return generate(self, inputs, **settings)

    monkeypatch.setattr(type(model), "generate", record)
    words = [str(tmp_path), "--max-new-tokens", "2", *arguments]
    assert ask(words, "hi\n", monkeypatch, capsys)[0] == 0
    assert [prompt.endswith("no thoughts") for prompt in prompts] == [bool(arguments)]


def test_neither_template_is_said(tmp_path, model_folder, monkeypatch, capsys):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = None
    AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, _, err = ask([str(tmp_path), "--max-new-tokens", "4"], "hi\n", monkeypatch, capsys)
    assert "no chat template" in err


def test_four_bits_and_eight(model_folder, monkeypatch, capsys):
    words = [str(model_folder), *TEMPLATE, "--max-new-tokens", "3", "--bits"]
    for bits in "4", "8":
        status, out, _ = ask([*words, bits], "hello\n", monkeypatch, capsys)
        assert status == 0 and "assistant: " in out


def save_adapter(base: Path, folder: Path) -> Path:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"])
    )
    model.save_pretrained(folder)
    write_fingerprint(folder, str(base), Weights(base))
    return folder


def test_an_adapter_by_flag_and_by_itself(model_folder, tmp_path, monkeypatch, capsys):
    adapter = save_adapter(model_folder, tmp_path / "adapter")
    for words in [str(model_folder), "--adapter", str(adapter)], [str(adapter)]:
        status, out, _ = ask([*words, *TEMPLATE], f"{QUESTIONS[0]}\n", monkeypatch, capsys)
        assert status == 0 and ANSWER in out


def test_what_cannot_be_loaded_is_said(model_folder, tmp_path, monkeypatch, capsys):
    adapter = save_adapter(model_folder, tmp_path / "adapter")
    other = save_tiny(tmp_path / "other", seed=3)
    empty = tmp_path / "empty"
    empty.mkdir()
    model = str(model_folder)
    cases = {
        "there is no model folder": ["./nowhere"],
        "cannot be fetched from the Hugging Face hub": ["nobody/nothing-here"],
        "has no adapter_config.json": [model, "--adapter", str(empty)],
        "it was trained on": [str(other), "--adapter", str(adapter)],
        "takes no images": [model, "--image", "cat.png"],
        "plugins work with MOSS": [model, "--with-plugins", "solve"],
        "needs the package 'lagent'": [model, "--lagent"],
        "not allowed with": [model, "--adapter", "a", "--llava", "b"],
    }
    for text, words in cases.items():
        status, _, err = ask(words, "hi\n", monkeypatch, capsys)
        assert status != 0 and text in err and "Traceback" not in err, err
