"""Reasoning in answers: ``<think>...</think>`` blocks, and what becomes of them in training.

Templates such as Qwen3's write an empty block before an answer without reasoning. Where it has a
loss, models learn to think nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

TRAIN_THINKING = ("keep", "mask_empty", "drop")
"""Train blocks as they are; empty ones without loss; no reasoning, and no loss on empty ones."""

_BLOCK = re.compile(r"<think>.*?</think>\s*", re.S)
_EMPTY = re.compile(r"<think>\s*</think>\s*")
_FIELDS = ("reasoning_content", "reasoning", "thinking")


def empty_blocks(text: str) -> list[tuple[int, int]]:
    """Start and end of each empty block, with the whitespace after it."""
    return [match.span() for match in _EMPTY.finditer(text)]


def without_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without its reasoning, whether in its content or in a field of its own."""
    kept = {key: value for key, value in message.items() if key not in _FIELDS}
    if isinstance(kept.get("content"), str):
        kept["content"] = _BLOCK.sub("", kept["content"])
    return kept


def turn_for(mode: str, turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """A turn, whose template is in place, as ``mode`` says.

    An empty block at the start of the answer becomes the end of the question: there it has no loss,
    and there a template puts it that is told not to think.

    Args:
        mode: of ``TRAIN_THINKING``.
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
