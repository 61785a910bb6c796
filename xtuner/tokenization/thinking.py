"""Reasoning in answers: ``<think>...</think>`` blocks, and what becomes of them in training.

Templates such as Qwen3's write an empty block before an answer without reasoning. Where it has a
loss, models learn to think nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Spaces after the line breaks are the answer's: it may be indented code.
_BLOCK = re.compile(r"<think>.*?</think>[ \t]*\n*", re.S)
_EMPTY = re.compile(r"<think>\s*</think>[ \t]*\n*")
_PROMPTED = re.compile(r"<think>\s*(</think>\s*)?\Z")
_FIELDS = ("reasoning_content", "reasoning", "thinking")


def empty_blocks(text: str) -> list[tuple[int, int]]:
    """Start and end of each empty block, with the whitespace after it."""
    return [match.span() for match in _EMPTY.finditer(text)]


def without_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without its reasoning, whether in its content or in a field of its own."""
    kept = {key: value for key, value in message.items() if key not in _FIELDS}
    content = kept.get("content")
    if isinstance(content, str):
        kept["content"] = _BLOCK.sub("", content)
    elif isinstance(content, list):
        kept["content"] = [
            {**part, "text": _BLOCK.sub("", part["text"])} if part.get("type") == "text" else part
            for part in content
        ]
    return kept


def reasoning_field(message: Mapping[str, Any]) -> str:
    """The name of the field of a message that holds reasoning; empty where none does."""
    values = ((name, message.get(name)) for name in _FIELDS)
    return next((name for name, v in values if isinstance(v, str) and v.strip()), "")


def with_field_of(template: str, message: dict[str, Any]) -> dict[str, Any]:
    """A message whose reasoning is in the field that a chat template reads, if it reads one."""
    given = reasoning_field(message)
    read = [name for name in _FIELDS if re.search(rf"\b{name}\b", template)]
    if not given or not read or given in read:
        return message
    kept = {key: value for key, value in message.items() if key != given}
    return {**kept, read[0]: message[given]}


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The reasoning of an answer, from a field of its own or from its content; may be empty."""
    name = reasoning_field(message)
    if name:
        return str(message[name]).strip()
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    block, mark, _ = str(content).partition("</think>")
    return block.strip().removeprefix("<think>").strip() if mark else ""


def after_block(text: str, empty: bool = False) -> str:
    """A text without the think block that it begins with, if it does.

    Args:
        text: an answer.
        empty: only a block without reasoning.
    """
    start = len(text) - len(text.lstrip())
    match = (_EMPTY if empty else _BLOCK).match(text, start)
    return text[match.end() :] if match else text


def open_block(prompt: str) -> tuple[int, bool]:
    """Where the think block begins with which a prompt ends, and whether it ends there too.

    The length of the prompt, and false, where it ends with none.
    """
    match = _PROMPTED.search(prompt)
    return (match.start(), bool(match[1])) if match else (len(prompt), False)


def turn_for(mode: str, turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """A turn, whose template is in place, as ``mode`` says.

    An empty block at the start of the answer becomes the end of the question: there it has no loss,
    and there a template puts it that is told not to think.

    Args:
        mode: of ``dataset_settings.TRAIN_THINKING``.
        turn: ``input`` and ``output``.
    """
    output = turn.get("output")
    if mode == "keep" or not isinstance(output, str):
        return turn
    match = _EMPTY.match(output)
    if match:
        turn = {**turn, "input": f"{turn.get('input') or ''}{match.group()}"}
        output = output[match.end() :]
    if mode == "drop":
        output = _BLOCK.sub("", output)
    return {**turn, "output": output}
