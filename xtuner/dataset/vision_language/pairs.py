"""Pairs of answers in the layouts of TRL, LLaMA-Factory and ms-swift, with images or without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from xtuner.dataset.vision_language.content_parts import messages_of_row
from xtuner.utils.errors import BadRowError
from xtuner.utils.lang import tr
from xtuner.utils.types import RowFunction

ANSWER_COLUMNS = {
    "chosen": ("chosen", "chosen_response", "chosen_messages", "response"),
    "rejected": ("rejected", "rejected_response", "rejected_messages"),
}
"""The names of the columns of answers; of several the first that a row has."""
PROMPT_COLUMNS = ("prompt", "question", "query", "instruction")


@dataclass(frozen=True)
class PairSide:
    """Makes a conversation that ends in one of a row's two answers.

    Args:
        side: ``chosen`` or ``rejected``.
        map_row: what is applied to the row before.
    """

    side: str
    map_row: RowFunction | None = None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Give ``messages``; the row's images stay where they are.

        Raises:
            BadRowError: when the row has no prompt, or not this answer.
        """
        mapped = self.map_row(dict(row)) if self.map_row else {}
        row = {name: value for name, value in {**row, **mapped}.items() if value is not None}
        answer, chosen = _answer(row, self.side), _answer(row, "chosen")
        talk = _prompt(row)
        ends = bool(talk) and talk[-1].get("role") == "assistant"
        if self.side == "chosen" and answer is None and ends:  # of ms-swift
            return {"messages": talk, **mapped}
        if answer is None:
            raise BadRowError(tr("it has no {side} answer", side=self.side))
        if answer[0].get("role") in ("user", "system"):  # a conversation of its own
            return {**mapped, "messages": answer}
        if chosen is None:
            talk = talk[:-1]
        return {**mapped, "messages": [*talk, *answer]}


_OF_OTHER_TOOLS = (
    *("messages", "conversations", "question", "query", "instruction"),
    *(name for names in ANSWER_COLUMNS.values() for name in names[1:]),
)
"""Columns that rows of ``prompt``, ``chosen`` and ``rejected`` do not have."""


def plain_pair(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A pair of texts in the layout of another tool as ``prompt``, ``chosen`` and ``rejected``.

    Returns:
        ``row`` itself if it has none of the other layouts' columns, or has a ``prompt``.

    Raises:
        BadRowError: when the row has no prompt, or lacks an answer.
    """
    named = any(row.get(name) is not None for name in _OF_OTHER_TOOLS)
    if row.get("prompt") is not None or not named:
        return row
    chosen, rejected = (PairSide(side)(row)["messages"] for side in ANSWER_COLUMNS)
    both = zip(chosen[:-1], rejected[:-1], strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
    return {"prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}


def _answer(row: Mapping[str, Any], side: str) -> list[dict[str, Any]] | None:
    """The messages of an answer; None where the row has none."""
    value = next((row[name] for name in ANSWER_COLUMNS[side] if name in row), None)
    if value is None:
        return None
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    items = value if isinstance(value, Sequence) else [value]
    found = messages_of_row({"messages": list(items)})
    if not found or found[-1]["role"] != "assistant":
        raise BadRowError(tr("its {side} answer does not end with the assistant", side=side))
    return found


def _prompt(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages before the answers."""
    for name in ("messages", "conversations", *PROMPT_COLUMNS):
        value = row.get(name)
        if isinstance(value, list):
            return messages_of_row({**row, "messages": value})
        if isinstance(value, str) and value:
            more = row.get("input") if name == "instruction" else None
            content = f"{value}\n{more}" if more else value
            return messages_of_row({**row, "messages": [{"role": "user", "content": content}]})
    return []
