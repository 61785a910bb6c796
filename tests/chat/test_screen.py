"""The chat's commands, typed as lines of a pipe."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest

from tests.helpers.answering import ANSWER, QUESTIONS
from xtuner.chat import screen
from xtuner.utils.errors import UserError


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
    ]
    saved = json.loads((tmp_path / "talk.jsonl").read_text())
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"] * 2
    assert saved["messages"][1]["content"] == ANSWER
    assert session.turns == [] and session.system == "You are kind."
    said = capsys.readouterr().err
    assert "nothing to undo" in said and "there is no command /nothing" in said


def run(session, lines, monkeypatch, **settings) -> bool:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    return screen.run_chat(session, **settings)


@pytest.mark.parametrize("word", ["/exit", "/quit", "exit"])
def test_words_that_end_the_chat(word, session, monkeypatch):
    run(session, [word, QUESTIONS[0]], monkeypatch)
    assert session.turns == []


@pytest.mark.parametrize("word", ["/reset", "/clear", "RESET"])
def test_words_that_clear_the_history(word, session, monkeypatch):
    run(session, [QUESTIONS[0], word], monkeypatch)
    assert session.turns == []


def test_a_path_is_a_question(session, monkeypatch):
    asked = []
    monkeypatch.setattr(session, "ask", lambda question, show=None: asked.append(question) or "")
    run(session, ["/etc/hosts is what?", "/foo", "/Foo bar"], monkeypatch)
    assert asked == ["/etc/hosts is what?"]


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_cannot_control_the_terminal(stream, session, monkeypatch, capsys):
    hostile = "a\x1b[31mred\x1b]0;title\x07 \r\x08\x9b2J\tend\n"

    def ask(question, show=None):
        for part in hostile if show else ():
            show(part)
        return hostile

    monkeypatch.setattr(session, "ask", ask)
    run(session, ["hi"], monkeypatch, stream=stream)
    out = capsys.readouterr().out
    assert "a[31mred]0;title 2J\tend\n" in out
    assert not any(code in out for code in "\x1b\x07\x08\r\x9b")


def test_the_history_is_private(tmp_path):
    file = tmp_path / "chat_history"
    file.write_text("old")
    file.chmod(0o644)
    for each in (file, tmp_path / "new"):
        assert screen._private(each).stat().st_mode & 0o777 == 0o600
    assert file.read_text() == "old"


def test_a_history_that_cannot_be_kept_ends_no_chat(tmp_path, monkeypatch, capsys):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    screen._history().append_string("kept for this chat")
    assert "not kept for another time" in capsys.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    history = screen._history()
    assert (tmp_path / "xtuner" / "chat_history").stat().st_mode & 0o777 == 0o600
    history.filename = "/dev/full"
    history.append_string("lost")


def test_saving_needs_a_file_that_can_be_written(session, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    run(session, ["/save", f"/save {tmp_path / 'file' / 'below'}"], monkeypatch)
    said = capsys.readouterr().err
    assert "[usage: /save FILE]" in said and "[not saved: " in said
    assert session.turns == []


def test_the_system_prompt_is_saved_too(session, tmp_path, monkeypatch):
    run(session, ["/system Be kind.", QUESTIONS[0], f"/save {tmp_path / 'a.jsonl'}"], monkeypatch)
    (row,) = (tmp_path / "a.jsonl").read_text("utf-8").splitlines()
    messages = json.loads(row)["messages"]
    assert messages[0] == {"role": "system", "content": "Be kind."}
    assert [each["role"] for each in messages[1:]] == ["user", "assistant"]


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_is_printed_once(stream, session, monkeypatch, capsys):
    run(session, [QUESTIONS[1]], monkeypatch, stream=stream)
    assert capsys.readouterr().out == f"user: {QUESTIONS[1]}\nassistant: {ANSWER}\n"


def test_an_error_of_one_question_does_not_end_the_chat(session, monkeypatch, capsys):
    def refuse(question: str, show: Any = None) -> str:
        raise UserError("too long")

    monkeypatch.setattr(session, "ask", refuse)
    assert not run(session, ["one", "two"], monkeypatch)
    assert capsys.readouterr().err.count("[too long]") == 2


def test_ctrl_c_in_a_pipe_ends_the_command(session, monkeypatch):
    def interrupt(question: str, show: Any = None) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "ask", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(session, ["one"], monkeypatch)
