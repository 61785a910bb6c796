"""The token ids of a conversation."""

from __future__ import annotations

import signal

import pytest
from transformers import GenerationConfig

from tests.helpers.tiny import make_tokenizer
from xtuner.chat.prompt import ChatPrompt, Turn, to_messages
from xtuner.tokenization.rendering import time_limit
from xtuner.utils.errors import UserError
from xtuner.utils.templates import PROMPT_TEMPLATE

TURNS = [Turn("Hi", "Hello"), Turn("Who?")]


def test_chat_ids_are_pieces_as_in_training(session):
    turns = [Turn("a {b}", "c"), Turn("d")]
    ids = session.prompt.ids(turns, "S")
    text = session.prompt.tokenizer.decode(ids)
    assert text == (
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\na {b}<|im_end|>\n"
        "<|im_start|>assistant\nc<|im_end|>\n<|im_start|>user\nd<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_tokenizers_own_template(tokenizer):
    prompt = ChatPrompt(tokenizer)
    expected = tokenizer.apply_chat_template(
        to_messages(TURNS, "S"), tokenize=False, add_generation_prompt=True
    )
    assert prompt.kind == "tokenizer"
    assert prompt.ids(TURNS, "S") == tokenizer.encode(expected, add_special_tokens=False)


@pytest.fixture
def without_template(tokenizer):
    kept, tokenizer.chat_template = tokenizer.chat_template, None
    yield tokenizer
    tokenizer.chat_template = kept


def test_without_any_template_the_text_goes_in_as_it_is(without_template):
    prompt = ChatPrompt(without_template)
    assert prompt.kind == "raw"
    assert without_template.decode(prompt.ids(TURNS, "S")) == "S\nHi\nHello\nWho?"


def test_stop_ids_and_stop_texts(tokenizer):
    prompt = ChatPrompt(tokenizer, PROMPT_TEMPLATE.internlm2_chat, ["several words"])
    ids, texts = prompt.stops(GenerationConfig(eos_token_id=[7]))
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ids and ids[-1] == 7
    assert texts == ["several words"]
    assert len(set(ids)) == len(ids)


def test_the_id_that_ends_an_answer(tokenizer):
    internlm2 = ChatPrompt(tokenizer, PROMPT_TEMPLATE.internlm2_chat)
    assert internlm2.answer_end() == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ChatPrompt(tokenizer, PROMPT_TEMPLATE.vicuna).answer_end() == tokenizer.eos_token_id


def test_messages_of_a_conversation():
    assert to_messages(TURNS, "S") == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Who?"},
    ]


def test_a_template_that_does_not_end_is_refused(monkeypatch):
    monkeypatch.setattr("xtuner.tokenization.rendering.TEMPLATE_SECONDS", 0.2)
    loop = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    for template in (loop, "{{ range(10 ** 9) }}", "{{ 'x' * 10 ** 10 }}"):
        tokenizer = make_tokenizer(chat_template=template)
        with pytest.raises(UserError, match="does not end") as refused:
            ChatPrompt(tokenizer).ids([Turn("hi")])
        assert "--prompt-template" in refused.value.hint


def test_a_time_limit_leaves_nothing_behind():
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(1):
        pass
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    "template",
    [
        "{% import 'os' as os %}{{ os }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        f"{{{{ {'(' * 5000}1{')' * 5000} }}}}",
    ],
    ids=["no loader", "recursion", "nested"],
)
def test_a_template_that_cannot_be_run_is_refused(template):
    with pytest.raises(UserError, match="chat template fails"):
        ChatPrompt(make_tokenizer(chat_template=template)).ids([Turn("hi")])
