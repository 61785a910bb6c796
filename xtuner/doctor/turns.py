"""Who says what in a raw row, whatever its layout: the one form that the checks look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xtuner.doctor.layouts import MESSAGES, SHAREGPT, TURNS, Layout, messages_of


@dataclass(frozen=True)
class Said:
    """One message: ``role`` is system, user, assistant or tool; quoted when unknown."""

    role: str
    text: str
    trained: bool = True
    calls_tools: bool = False


def speech(row: Mapping[str, Any], layout: Layout) -> list[Said]:
    """The messages of a row that fits its layout, in order."""
    if TURNS in layout.fields.values():
        return from_turns(row["conversation"])
    if layout.name == "pretrain":
        return [Said("assistant", row["text"])]
    if layout.name == "oasst1":
        return _from_oasst1(row["text"])
    if layout.preference:
        return _from_preference(row, layout)
    for field, kind in layout.fields.items():
        if kind in (MESSAGES, SHAREGPT):
            return _from_messages(row[field], layout)
    *asked, answer = (row[field] for field in layout.fields)
    if layout.name == "colors":
        asked = [asked[0].partition(":")[2]]
    return [Said("user", "\n".join(asked)), Said("assistant", answer)]


def from_turns(conversation: list[Mapping[str, Any]]) -> list[Said]:
    """The messages of turns ``{system, input, output}``."""
    said = []
    for turn in conversation:
        if turn.get("system"):
            said.append(Said("system", turn["system"]))
        said.append(Said("user", turn["input"]))
        said.append(Said("assistant", turn["output"], bool(turn.get("output_with_loss", True))))
    return said


def _from_messages(messages: list[Any], layout: Layout) -> list[Said]:
    said = []
    for message, (role, content) in zip(messages, messages_of(messages), strict=True):
        role = (layout.roles or {}).get(role.lower(), repr(role))
        trained = str(message.get("loss", True)).lower() != "false"
        calls = bool(message.get("tool_calls") or message.get("function_call"))
        said.append(Said(role, _text(content), trained, calls))
    return said


def _text(content: Any) -> str:
    """The text of a message; of one in parts, the parts that are text."""
    if isinstance(content, list):
        parts = (part.get("text") for part in content if isinstance(part, dict))
        return "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def _from_oasst1(text: str) -> list[Said]:
    said = []
    for piece in text.split("### Human:")[1:]:
        question, mark, answer = piece.partition("### Assistant:")
        said.append(Said("user", question))
        if mark:
            said.append(Said("assistant", answer))
    return said


def _from_preference(row: Mapping[str, Any], layout: Layout) -> list[Said]:
    """Prompt and chosen answer; the rejected one is compared by its own check."""
    if layout.name == "intel_orca_dpo":
        return [Said("user", row["question"]), Said("assistant", row["chosen"])]
    return _from_messages([*row.get("prompt", []), *row["chosen"]], layout)
