"""The user interface of ``xtuner chat``: a line editor in a terminal, or lines of a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.chat.prompt import ChatImage
from xtuner.chat.session import ChatSession
from xtuner.utils.errors import UserError, Where
from xtuner.utils.files import write_text
from xtuner.utils.lang import tr
from xtuner.utils.terminal import printable

if TYPE_CHECKING:
    from PIL.Image import Image
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyPressEvent

USER, ASSISTANT = "user: ", "assistant: "
_COMMAND = re.compile(r"/[A-Za-z]+")


def run_chat(session: ChatSession, *, stream: bool = True) -> bool:
    """Ask and answer until ``exit`` or the end of the input.

    Args:
        session: the conversation.
        stream: print answers as they are generated, not when they are complete.

    Returns:
        Whether every question was answered.
    """
    answered = True
    in_terminal = sys.stdin.isatty()
    if in_terminal:
        print(tr("exit: quit, RESET: clear the history, Alt-Enter: new line, /help: more commands"))
    for line in _typed() if in_terminal else _piped():
        question = line.strip()
        word = question.partition(" ")[0]
        if question.lower() == "exit" or word in ("/exit", "/quit"):
            break
        if not question:
            continue
        if question == "RESET" or word in ("/reset", "/clear"):
            session.reset()
            _note(tr("[history cleared]"))
        elif _COMMAND.fullmatch(word):
            _command(session, question, stream)
        else:
            answered = _answer(session, question, stream) and answered
    return answered


def _typed() -> Iterator[str]:
    """Lines typed in a terminal, with editing, history and several lines at once."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    editor: PromptSession[str] = PromptSession(USER, history=_history(), key_bindings=keys)
    while True:
        try:
            yield editor.prompt()
        except EOFError:
            return
        except KeyboardInterrupt:
            _note(tr("[Ctrl-D or exit: quit]"))


def _history() -> History:
    """What was typed before, in a file where there can be one: a full disk ends no chat."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):
                super().store_string(string)

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "xtuner"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return Kept(str(_private(cache / "chat_history")))
    except OSError as error:
        _note(tr("[what you type is not kept for another time: {error}]", error=error))
        return InMemoryHistory()


def _private(file: Path) -> Path:
    """A file that only its user can read: questions may hold secrets."""
    file.touch(mode=0o600)
    file.chmod(0o600)
    return file


def _piped() -> Iterator[str]:
    """Lines of a pipe or a file, each printed before it is answered."""
    for line in sys.stdin:
        if line.strip() and line.strip().lower() != "exit":
            print(f"{USER}{printable(line.rstrip())}", flush=True)
        yield line


def _answer(session: ChatSession, question: str, stream: bool) -> bool:
    """Print the answer to a question, or why there is none; whether there is one."""
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
        return False
    return True


def _command(session: ChatSession, line: str, stream: bool) -> None:
    """Run a line that begins with ``/`` and a word."""
    word, _, rest = line.partition(" ")
    if word == "/help":
        _note(_help())
    elif word == "/system":
        session.system = rest.strip()
        session.reset()
        _note(tr("[system prompt set; history cleared]"))
    elif word in ("/image", "/video"):
        _attach(session, word, rest.strip())
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
            session.images = list(turn.images)
            _answer(session, turn.question, stream)
    else:
        _note(tr("[there is no command {word}; /help lists them]", word=word))


def read_image(file: str, upright: bool = True) -> Image:
    """Read an image as training does.

    Args:
        file: a path or an ``http(s)`` address.
        upright: turned as a viewer shows it, which LLaVA's rows are not.

    Raises:
        UserError: when it cannot be read.
    """
    from xtuner.dataset.images import load_image

    try:
        return load_image(file, upright)
    except OSError as error:
        raise UserError(
            tr("the image cannot be read: {error}", error=error.strerror or error),
            where=Where(file),
        ) from error


def _attach(session: ChatSession, word: str, file: str) -> None:
    """Add the image of ``/image FILE`` or the video of ``/video FILE`` to the next question."""
    if not file:
        _note(tr("[usage: {word} FILE]", word=word))
        return
    file = file.strip("'\"")
    file = file if "://" in file else str(Path(file).expanduser())
    prompt = session.prompt
    try:
        is_image = word == "/image"
        visual = read_image(file, prompt.takes_images) if is_image else prompt.read_video(file)
        session.attach(visual, file)
    except UserError as error:
        _note(f"[{error}]")
        return
    _note(tr("[the next question is about {file}]", file=file))


def _help() -> str:
    rows = {
        "exit, /quit, Ctrl-D": tr("quit"),
        "RESET, /clear": tr("clear the history"),
        "/system TEXT": tr("set the system prompt and clear the history"),
        "/retry": tr("answer the last question again"),
        "/undo": tr("remove the last question"),
        "/image FILE": tr("ask the next question about an image (too)"),
        "/video FILE": tr("ask the next question about a video (too)"),
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
    messages: list[dict[str, Any]] = []
    if session.system:
        messages.append({"role": "system", "content": session.system})
    for turn in session.turns:
        content: str | list[dict[str, Any]] = turn.question
        if turn.images:
            content = [*map(_part, turn.images), {"type": "text", "text": turn.question}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": turn.answer or ""})
    try:
        write_text(file, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        _note(tr("[not saved: {error}]", error=error))
        return
    _note(tr("[saved in {file}]", file=file))


def _part(visual: ChatImage) -> dict[str, Any]:
    """An image or a video as a part of a message."""
    from xtuner.dataset.videos import Clip

    kind = "video" if isinstance(visual.image, Clip) else "image"
    return {"type": kind, kind: visual.file}


def _note(text: str) -> None:
    print(printable(text), file=sys.stdout if sys.stdin.isatty() else sys.stderr, flush=True)
