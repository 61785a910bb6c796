"""The messages of a raw row, whatever its layout: the one form that the checks look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from xtuner.doctor.layouts import MESSAGES, SHAREGPT, TURNS, Layout, messages_of
from xtuner.tokenization.content import has_loss, is_on
from xtuner.tokenization.roles import ANY, CALLS


class Message(NamedTuple):
    """One message: ``role`` is system, user, assistant or tool; quoted when unknown."""

    role: str
    text: str
    trained: bool = True
    calls_tools: bool = False


def messages_of_row(row: Mapping[str, Any], layout: Layout) -> list[Message]:
    """The messages of a row that fits its layout, in order."""
    if TURNS in layout.fields.values():
        return from_turns(row["conversation"])
    if layout.name == "pretrain":
        return [Message("assistant", _text(row["text"]))]
    if layout.name == "oasst1":
        return _from_oasst1(_text(row["text"]))
    if layout.preference:
        return _from_preference(row, layout)
    for field, kind in layout.fields.items():
        if kind in (MESSAGES, SHAREGPT):
            return _from_messages(row[field], layout)
    *asked, answer = (_text(row.get(field)) for field in layout.fields)
    if layout.name == "colors":
        asked = [asked[0].partition(":")[2]]
    return [Message("user", "\n".join(asked)), Message("assistant", answer)]


def from_turns(conversation: list[Mapping[str, Any]]) -> list[Message]:
    """The messages of turns ``{system, input, output}``."""
    messages = []
    for turn in conversation:
        if turn.get("system"):
            messages.append(Message("system", _text(turn["system"])))
        messages.append(Message("user", _text(turn.get("input"))))
        trained = is_on(turn, "output_with_loss")
        messages.append(Message("assistant", _text(turn["output"]), trained))
    return messages


def _from_messages(items: list[Any], layout: Layout) -> list[Message]:
    messages = []
    reads_loss = SHAREGPT not in layout.fields.values() or layout.roles is ANY
    for message, (role, content) in zip(items, messages_of(items), strict=True):
        name = role.lower()
        role = (layout.roles or {}).get(name, repr(role))
        calls = bool(message.get("tool_calls") or message.get("function_call") or name in CALLS)
        trained = has_loss(message) if reads_loss else True
        messages.append(Message(role, _text(content), trained, calls))
    return messages


def _text(content: object) -> str:
    """The text of a value; of one in parts, the parts that are text."""
    if isinstance(content, list):
        parts = (part.get("text") if isinstance(part, dict) else part for part in content)
        return "\n".join(part for part in parts if isinstance(part, str))
    return "" if content is None else str(content)


def _from_oasst1(text: str) -> list[Message]:
    messages = []
    for piece in text.split("### Human:")[1:]:
        question, mark, answer = piece.partition("### Assistant:")
        messages.append(Message("user", question))
        if mark:
            messages.append(Message("assistant", answer))
    return messages


def _from_preference(row: Mapping[str, Any], layout: Layout) -> list[Message]:
    """Prompt and chosen answer; the rejected one is compared by its own check."""
    if layout.name == "intel_orca_dpo":
        return [Message("user", _text(row["question"])), Message("assistant", _text(row["chosen"]))]
    asked = row.get("prompt") or []
    asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    chosen = row["chosen"]
    if isinstance(chosen, str):
        chosen = [{"role": "assistant", "content": chosen}]
    if not asked and len(chosen) == 1:
        asked = [{"role": "user", "content": "-"}]  # the prompt is inside the text
    return _from_messages([*asked, *chosen], layout)


def messages_with_images(
    row: Mapping[str, Any], function: Callable[[Any], Any] | None
) -> list[Message] | None:
    """The messages of a row with images, each image as ``<image>``, each video as ``<video>``.

    Args:
        row: of any layout.
        function: the user's own map function; None where the layout is recognised.

    Returns:
        None for a row that cannot be used.
    """
    from xtuner.dataset.vision_language.content_parts import conversation_of

    try:
        return [
            Message(
                message["role"],
                "".join(part.get("text", f"<{part['type']}>") for part in message["content"]),
                has_loss(message),
                bool(message.get("tool_calls")),
            )
            for message in conversation_of(row, function).messages
        ]
    except Exception:  # whatever the user's function may raise; encoding names the row
        return None
