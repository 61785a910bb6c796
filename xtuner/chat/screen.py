"""The user interface of ``xtuner chat``: a line editor in a terminal, or lines of a pipe."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner.chat.session import ChatSession
from xtuner.utils.errors import UserError
from xtuner.utils.files import write_text
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyPressEvent

USER, ASSISTANT = "user: ", "assistant: "
_COMMAND = re.compile(r"/[A-Za-z]+")
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def run_chat(session: ChatSession, *, stream: bool = True) -> None:
    """Ask and answer until ``exit`` or the end of the input.

    Args:
        session: the conversation.
        stream: print answers as they are generated, not when they are complete.
    """
    in_terminal = sys.stdin.isatty()
    if in_terminal:
        print(tr("exit: quit, RESET: clear the history, Alt-Enter: new line, /help: more commands"))
    for line in _typed() if in_terminal else _piped():
        question = line.strip()
        word = question.partition(" ")[0]
        if question.lower() == "exit" or word in ("/exit", "/quit"):
            return
        if not question:
            continue
        if question == "RESET" or word in ("/reset", "/clear"):
            session.reset()
            _note(tr("[history cleared]"))
        elif _COMMAND.fullmatch(word):
            _command(session, question, stream)
        else:
            _answer(session, question, stream)


def _typed() -> Iterator[str]:
    """Lines typed in a terminal, with editing, history and several lines at once."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "xtuner"
    cache.mkdir(parents=True, exist_ok=True)
    editor: PromptSession[str] = PromptSession(
        USER, history=FileHistory(str(_private(cache / "chat_history"))), key_bindings=keys
    )
    while True:
        try:
            yield editor.prompt()
        except EOFError:
            return
        except KeyboardInterrupt:
            _note(tr("[Ctrl-D or exit: quit]"))


def _private(file: Path) -> Path:
    """A file that only its user can read: questions may hold secrets."""
    file.touch(mode=0o600)
    file.chmod(0o600)
    return file


def printable(text: str) -> str:
    """A text without control characters, which could move the cursor or change the terminal.

    Args:
        text: of a model; line breaks and tabs stay.
    """
    return text.translate(_CONTROL)


def _piped() -> Iterator[str]:
    """Lines of a pipe or a file, each printed before it is answered."""
    for line in sys.stdin:
        if line.strip() and line.strip().lower() != "exit":
            print(f"{USER}{line.rstrip()}", flush=True)
        yield line


def _answer(session: ChatSession, question: str, stream: bool) -> None:
    print(ASSISTANT, end="", flush=True)
    try:
        if stream:
            session.ask(question, lambda text: print(printable(text), end="", flush=True))
            print(flush=True)
        else:
            print(printable(session.ask(question)), flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        _note(tr("[interrupted; this turn is discarded]"))
    except UserError as error:
        print()
        _note(f"[{error}]")


def _command(session: ChatSession, line: str, stream: bool) -> None:
    """Run a line that begins with ``/`` and a word."""
    word, _, rest = line.partition(" ")
    if word == "/help":
        _note(_help())
    elif word == "/system":
        session.system = rest.strip()
        session.reset()
        _note(tr("[system prompt set; history cleared]"))
    elif word == "/save":
        _save(session, rest.strip())
    elif word == "/undo":
        turn = session.undo()
        _note(
            tr("[removed: {question}]", question=turn.question)
            if turn
            else tr("[there is nothing to undo]")
        )
    elif word == "/retry":
        turn = session.undo()
        if turn is None:
            _note(tr("[there is nothing to retry]"))
        else:
            _answer(session, turn.question, stream)
    else:
        _note(tr("[there is no command {word}; /help lists them]", word=word))


def _help() -> str:
    rows = {
        "exit, /quit, Ctrl-D": tr("quit"),
        "RESET, /clear": tr("clear the history"),
        "/system TEXT": tr("set the system prompt and clear the history"),
        "/retry": tr("answer the last question again"),
        "/undo": tr("remove the last question"),
        "/save FILE": tr("write the conversation (JSON lines of messages)"),
        "Alt-Enter": tr("start a new line"),
        "Ctrl-C": tr("stop generating"),
    }
    return "\n".join(f"  {key:<20}{text}" for key, text in rows.items())


def _save(session: ChatSession, file: str) -> None:
    """Write the conversation as one line of messages, in the layout that training reads."""
    if not file:
        _note(tr("[usage: /save FILE]"))
        return
    messages = [{"role": "system", "content": session.system}] if session.system else []
    for turn in session.turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer or ""})
    try:
        write_text(file, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        _note(tr("[not saved: {error}]", error=error))
        return
    _note(tr("[saved in {file}]", file=file))


def _note(text: str) -> None:
    print(text, file=sys.stdout if sys.stdin.isatty() else sys.stderr, flush=True)
