"""One side of a pair of answers, in the layouts of TRL, LLaMA-Factory and ms-swift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.dataset.image_rows import BadRowError
from xtuner.dataset.vision_language.content_parts import messages_of_row
from xtuner.utils.lang import tr
from xtuner.utils.types import RowFunction

ANSWER_COLUMNS = {
    "chosen": ("chosen", "chosen_response", "chosen_messages"),
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
        if self.side == "chosen" and answer is None:  # ms-swift: it ends the conversation
            return {"messages": talk, **mapped}
        if answer is None:
            raise BadRowError(tr("it has no {side} answer", side=self.side))
        if answer[0].get("role") in ("user", "system"):  # a conversation of its own
            return {**mapped, "messages": answer}
        if chosen is None:
            talk = talk[:-1]
        return {**mapped, "messages": [*talk, *answer]}


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
