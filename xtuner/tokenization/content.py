"""What a message of published data holds: its text, and whether it is trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_SWITCHES = {"true": True, "1": True, "false": False, "0": False}


def is_on(turn: Mapping[str, Any], name: str) -> bool:
    """A switch of a turn or message, on by default: a bool, its text, 0 or 1.

    Arrow gives None for a field that only other rows have, so None means that it is not given.

    Raises:
        ValueError: for any other value.
    """
    value = turn.get(name)
    if value is None or isinstance(value, bool):
        return value is not False
    switch = _SWITCHES.get(str(value).strip().lower())
    if switch is None:
        raise ValueError(f"{name!r} is {value!r:.40}, expected true or false")
    return switch


_TURN = frozenset({"input", "output", "system", "sep", "output_with_loss", "need_eos_token"})


def question_of(turn: Mapping[str, Any]) -> Any:
    """The question of a turn; empty where it has none.

    Raises:
        ValueError: where it may have one under another name; for a value that is no text.
    """
    question = turn.get("input")
    if question is not None:
        return text_value(question)
    others = [name for name, value in turn.items() if name not in _TURN and value is not None]
    if others:
        raise ValueError(f"a turn has no 'input', but {', '.join(map(repr, others))}")
    return ""


def has_loss(message: Mapping[str, Any]) -> bool:
    """Whether a message is trained on: its ``loss``, a switch."""
    return is_on(message, "loss")


def text_value(value: Any) -> Any:
    """A text, number or switch as it is.

    Raises:
        ValueError: for nothing, a list, an object or no finite number: as text they would be
            Python's ``None``, ``[...]``, ``{...}`` and ``nan``.
    """
    is_infinite = isinstance(value, float) and not math.isfinite(value)
    if value is None or is_infinite or isinstance(value, list | tuple | Mapping):
        raise ValueError(f"{value!r:.40} is no text")
    return value


def text_of(content: object) -> str:
    """The text of a message's content: a text, nothing, or the parts of OpenAI's list.

    Raises:
        ValueError: for a part that is no text, such as an image.
    """
    if content is None:
        return ""
    if not isinstance(content, list):
        return str(text_value(content))
    texts = []
    for part in content:
        text = part if isinstance(part, str) else _text_of_part(part)
        if text is None:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"a part of a message is {kind!r}; only text can be trained on here")
        texts.append(text)
    return "".join(texts)


def content_of(message: Mapping[str, Any]) -> Any:
    """A message's content as it is; None only beside calls of tools.

    Raises:
        ValueError: when it is missing or null: an empty answer would teach a model to say nothing.
    """
    content = message.get("content")
    if content is None and not (message.get("tool_calls") or message.get("function_call")):
        raise ValueError(f"the content of a message of {message.get('role')!r} is null")
    return content


def merged_parts(content: object) -> list[dict[str, Any]]:
    """A message's content as a list of parts, texts that follow one another joined in one part.

    Some templates read the first text part alone. There is always one part.

    Raises:
        ValueError: for a value that is no content.
    """
    if not isinstance(content, list):
        return [{"type": "text", "text": text_of(content)}]
    merged: list[dict[str, Any]] = []
    for part in content:
        text = part if isinstance(part, str) else _text_of_part(part)
        if text is None:
            if not isinstance(part, Mapping):
                raise ValueError(f"{part!r:.40} is no part of a message")
            merged.append(dict(part))
        elif merged and merged[-1]["type"] == "text":
            merged[-1]["text"] += text
        else:
            merged.append({"type": "text", "text": text})
    return merged or [{"type": "text", "text": ""}]


def _text_of_part(part: object) -> str | None:
    if not isinstance(part, Mapping) or part.get("type", "text") != "text":
        return None
    text = part.get("text")
    return text if isinstance(text, str) else None
