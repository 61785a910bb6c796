"""`xtuner chat`: what a user sees, from a pipe and on a terminal."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.answering import ANSWER, QUESTIONS, save_answering_model
from tests.helpers.tiny import save_tiny
from xtuner.chat import screen
from xtuner.chat.prompt import ChatPrompt, Turn
from xtuner.chat.session import ChatSession, Sampling
from xtuner.entry_point import main
from xtuner.export.fingerprint import write_fingerprint
from xtuner.export.weights import Weights
from xtuner.utils.templates import PROMPT_TEMPLATE

TEMPLATE = ["--prompt-template", "internlm2_chat"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_answering_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def session(model_folder) -> ChatSession:
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    prompt = ChatPrompt(tokenizer, PROMPT_TEMPLATE.internlm2_chat)
    return ChatSession(model, prompt, sampling=Sampling(max_new_tokens=30, temperature=0))


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


def test_as_typed_in_a_shell(model_folder):
    command = [sys.executable, "-m", "xtuner", "chat", str(model_folder), *TEMPLATE]
    done = subprocess.run(
        command, input=f"{QUESTIONS[1]}\nexit\n", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert ANSWER in done.stdout and "<|im_end|>" not in done.stdout


def test_without_a_template_the_tokenizers_own_is_used(model_folder, monkeypatch, capsys):
    _, out, err = ask([str(model_folder)], f"{QUESTIONS[0]}\n", monkeypatch, capsys)
    assert "the tokenizer's chat template" in err
    assert out.startswith(f"user: {QUESTIONS[0]}\nassistant: ")


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
        "need --llava": [model, "--image", "cat.png"],
        "plugins work with MOSS": [model, "--with-plugins", "solve"],
        "needs the package 'lagent'": [model, "--lagent"],
        "not allowed with": [model, "--adapter", "a", "--llava", "b"],
    }
    for text, words in cases.items():
        status, _, err = ask(words, "hi\n", monkeypatch, capsys)
        assert status != 0 and text in err and "Traceback" not in err, err


def test_history_reset_undo_retry_system_save(session, tmp_path, monkeypatch, capsys):
    typed = [
        QUESTIONS[0],
        "/retry",
        QUESTIONS[1],
        f"/save {tmp_path / 'talk.jsonl'}",
        "/undo",
        "/nothing special",
        "/system You are kind.",
        "/undo",
        "/help",
        "RESET",
        "EXIT",
        "never asked",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed)))
    lengths = []
    asked = session.ask

    def counting(question: str, show: Any = None) -> str:
        answer = asked(question, show)
        lengths.append((question, len(session.turns)))
        return answer

    monkeypatch.setattr(session, "ask", counting)
    screen.run_chat(session)
    assert lengths == [
        (QUESTIONS[0], 1),
        (QUESTIONS[0], 1),
        (QUESTIONS[1], 2),
        ("/nothing special", 2),
    ]
    saved = json.loads((tmp_path / "talk.jsonl").read_text())
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"] * 2
    assert saved["messages"][1]["content"] == ANSWER
    assert session.turns == [] and session.system == "You are kind."
    assert "nothing to undo" in capsys.readouterr().err


def test_history_is_trimmed_by_whole_turns_and_said(session):
    notes: list[str] = []
    session.notice = notes.append
    session.system = "Be kind."
    for _ in range(12):
        session.ask(QUESTIONS[0])
    assert notes and "dropped" in notes[0]
    ids = session.prompt.ids(session.turns, session.system)
    text = session.prompt.tokenizer.decode(ids)
    assert text.count("Be kind.") == 1 and text.count("<|im_start|>system") == 1
    assert text.count("<|im_start|>user") == len(session.turns)
    with pytest.raises(Exception, match="the model takes 160"):
        session.ask("word " * 400)
    assert session.turns[-1].question == QUESTIONS[0]


def test_a_stop_word_of_several_tokens_ends_and_is_not_shown(session):
    session.prompt = ChatPrompt(
        session.prompt.tokenizer, PROMPT_TEMPLATE.internlm2_chat, extra_stop_words=["small assist"]
    )
    shown: list[str] = []
    assert session.ask(QUESTIONS[0], shown.append) == "I am a"
    assert "".join(shown).strip() == "I am a"


def test_streamed_text_is_the_answer(session):
    shown: list[str] = []
    assert session.ask(QUESTIONS[1], shown.append) == "".join(shown) == ANSWER
    assert len(shown) > 1


def test_tools_are_run_and_their_results_read(session, monkeypatch):
    from xtuner.chat import session as session_module

    raws = iter(["think<|Commands|>:Calculate(1+1)<eoc>", "It is two.<eom>"])
    prompts = []

    def generate(self, ids, show):
        raw = next(raws)
        prompts.append(self.prompt.tokenizer.decode(ids))
        return session_module._Answer([5], raw, raw.replace("<eoc>", "").replace("<eom>", ""))

    monkeypatch.setattr(ChatSession, "_generate", generate)
    session.run_tools = lambda call: f"{call} => 2.00\n"
    answer = session.ask("1+1?")
    assert "<|Results|>:\nCalculate(1+1) => 2.00\n<eor>" in prompts[1]
    assert answer.endswith("It is two.")


def test_chat_ids_are_pieces_as_in_training(session):
    turns = [Turn("a {b}", "c"), Turn("d")]
    ids = session.prompt.ids(turns, "S")
    text = session.prompt.tokenizer.decode(ids)
    assert text == (
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\na {b}<|im_end|>\n"
        "<|im_start|>assistant\nc<|im_end|>\n<|im_start|>user\nd<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_greedy_needs_no_sampling_settings():
    assert Sampling(temperature=0).settings()["do_sample"] is False
    assert Sampling().settings()["top_k"] == 40


def test_published_stop_criteria(session):
    from xtuner.utils import StopWordStoppingCriteria

    tokenizer = session.prompt.tokenizer
    stop = StopWordStoppingCriteria(tokenizer, "Paris")
    ids = [tokenizer.encode(text)[-6:] for text in ("capital is Paris", "Paris is capital")]
    size = min(map(len, ids))
    batch = torch.tensor([row[-size:] for row in ids])
    assert stop(batch, None).tolist() == [True, False]
