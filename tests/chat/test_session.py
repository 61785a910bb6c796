"""A session's history, generation and tool calls."""

from __future__ import annotations

import pytest

from tests.helpers.answering import ANSWER, QUESTIONS
from xtuner.chat.prompt import ChatPrompt
from xtuner.chat.session import ChatSession, Sampling, _Printer
from xtuner.utils.errors import UserError
from xtuner.utils.templates import PROMPT_TEMPLATE


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


def test_a_template_that_writes_nothing_is_refused(session, monkeypatch):
    monkeypatch.setattr(session.prompt, "template", None)
    monkeypatch.setattr(session.prompt.tokenizer, "chat_template", "{{ '' }}")
    with pytest.raises(UserError, match="the prompt is empty"):
        session.ask(QUESTIONS[0])
    assert not session.turns


def test_greedy_needs_no_sampling_settings():
    assert Sampling(temperature=0).settings()["do_sample"] is False
    assert Sampling().settings()["top_k"] == 40


def test_a_question_that_fails_leaves_no_turn(session, monkeypatch):
    def fail(self, ids, show):
        raise RuntimeError("out of memory")

    session.ask(QUESTIONS[0])
    monkeypatch.setattr(ChatSession, "_generate", fail)
    with pytest.raises(RuntimeError):
        session.ask(QUESTIONS[1])
    assert [turn.question for turn in session.turns] == [QUESTIONS[0]]
    assert session.undo().answer == ANSWER
    assert session.undo() is None


@pytest.mark.parametrize(
    ("parts", "shown"),
    [
        (["one <st", "op> two"], ["one "]),
        (["one <st", "art> two"], ["one ", "<start> two"]),
        (["one", " two<"], ["one", " two", "<"]),
        (["<stop>"], []),
    ],
)
def test_what_may_become_a_stop_word_is_held_back(parts, shown, tokenizer):
    printed: list[str] = []
    printer = _Printer(tokenizer, ["<stop>"], printed.append)
    for part in parts:
        printer.on_finalized_text(part)
    printer.on_finalized_text("", stream_end=True)
    assert printed == shown
