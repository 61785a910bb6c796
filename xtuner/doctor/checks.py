"""The checks: small functions that look at one row and give the codes of what is wrong with it.

``FIELD_CHECKS`` look at the raw row. When they find nothing, ``roles`` looks at who speaks, and
then ``MESSAGE_CHECKS`` at the messages. To add a check, write a function, add it to its table and
its code to ``rules.RULES``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xtuner.dataset.sources import loader_hint
from xtuner.doctor.layouts import (
    MESSAGES,
    SHAREGPT,
    TEXT,
    TURNS,
    Layout,
    is_plain,
    kind_problem,
    named,
)
from xtuner.doctor.turns import Message
from xtuner.tokenization.content import is_on, question_of
from xtuner.tokenization.roles import ANY
from xtuner.utils.constants import DEFAULT_IMAGE_TOKEN
from xtuner.utils.lang import tr

Problem = tuple[str, str]
"""The code of a kind and a detail in a few words."""


def missing_fields(row: Mapping[str, Any], layout: Layout) -> Iterator[Problem]:
    """Fields that the map function reads and the row lacks."""
    for name in layout.fields:
        if name in row:
            continue
        code = "not-given" if name in layout.optional else "missing-field"
        near = difflib.get_close_matches(name, map(str, row), n=1, cutoff=0.6)
        is_near = near and not loader_hint(row)
        hint = tr(" (there is {near!r})", near=near[0]) if is_near else fields_there(row)
        yield code, f"{name!r}{hint}"


def fields_there(row: Mapping[str, Any]) -> str:
    """The fields of a row, or the key that holds the rows where a file is one object."""
    if hint := loader_hint(row):
        return f" ({hint})"
    return tr(" (there are: {names})", names=", ".join(map(str, row))[:80])


def wrong_types(row: Mapping[str, Any], layout: Layout) -> Iterator[Problem]:
    """Fields whose value is of another kind than the map function reads."""
    for name, kind in layout.fields.items():
        if name not in row:
            continue
        problem = layout.field_problem(row, name, kind)
        if kind == TEXT and not problem and is_plain(row[name]):
            yield "not-text", f"{name!r}: {named(row[name])}"
        if problem:
            found, expected = problem
            yield (
                "wrong-type",
                tr(
                    "{name!r} is {found}, expected {expected}",
                    name=name,
                    found=found,
                    expected=expected,
                ),
            )


def broken_items(row: Mapping[str, Any], layout: Layout) -> Iterator[Problem]:
    """Turns and messages that lack a field or have one of the wrong kind."""
    for name, kind in layout.fields.items():
        value = row.get(name)
        if kind not in (TURNS, MESSAGES, SHAREGPT) or kind_problem(value, kind):
            continue
        assert isinstance(value, list)  # kind_problem has seen to it
        for index, item in enumerate(value):
            look = _turn if kind == TURNS else _message
            for code, key, found in look(item, kind):
                if key == "loss" and kind == SHAREGPT and layout.roles is not ANY:
                    continue  # nothing reads it
                detail = f"{name}[{index}].{key}"
                yield code, detail if code == "missing-field" else f"{detail}: {found}"


def _turn(turn: Mapping[str, Any], kind: str) -> Iterator[tuple[str, str, str]]:
    if "output" not in turn:
        yield "missing-field", "output", ""
    try:
        question_of(turn)
    except ValueError:
        if turn.get("input") is None:
            yield "missing-field", "input", ""
    for key in ("input", "output", "system", "sep"):
        value = turn.get(key)
        if value is not None and not isinstance(value, str):
            yield "not-text" if is_plain(value) else "wrong-type", key, named(value)
    if "output" in turn and turn["output"] is None:
        yield "wrong-type", "output", "null"
    for key in ("output_with_loss", "need_eos_token"):
        yield from _switch(turn, key)


def _switch(item: Mapping[str, Any], key: str) -> Iterator[tuple[str, str, str]]:
    try:
        is_on(item, key)
    except ValueError:
        yield "wrong-type", key, named(item[key])


def _message(message: Mapping[str, Any], kind: str) -> Iterator[tuple[str, str, str]]:
    key = "value" if kind == SHAREGPT else "content"
    content = message.get(key)
    if content is None:
        if not (message.get("tool_calls") or message.get("function_call")):
            code = "wrong-type" if key in message else "missing-field"
            yield code, key, "null"
    elif is_plain(content):
        yield "not-text", key, named(content)
    elif not isinstance(content, str | list) or (kind == SHAREGPT and isinstance(content, list)):
        yield "wrong-type", key, named(content)
    yield from _switch(message, "loss")


FIELD_CHECKS: Sequence[Callable[[Mapping[str, Any], Layout], Iterator[Problem]]] = (
    missing_fields,
    wrong_types,
    broken_items,
)


def roles(messages: Sequence[Message], layout: Layout) -> Iterator[Problem]:
    """Unknown roles, and roles out of order."""
    known = ("system", "user", "assistant", "tool")
    unknown = [message.role for message in messages if message.role not in known]
    if unknown:
        yield "bad-role", unknown[0]
        return
    before = "start"
    follows = {
        "user": ("start", "assistant"),
        "assistant": ("user", "tool"),
        "tool": ("assistant", "tool"),
    }
    for message in messages:
        if message.role == "system" or (message.calls_tools and before == "assistant"):
            continue
        if before not in follows[message.role] and layout.name != "pretrain":
            yield (
                "role-order",
                tr("{role} after {before}", role=message.role, before=before),
            )
            return
        before = message.role


def answers(messages: Sequence[Message], layout: Layout) -> Iterator[Problem]:
    """Rows without an answer, without a trained answer, or with a question left open."""
    given = [message for message in messages if message.role == "assistant"]
    if not given or given[0].text == "<nooutput>":
        yield "no-answer", ""
        return
    if not any(message.trained for message in given):
        yield "not-trained", ""
    if messages[-1].role in ("user", "tool"):
        yield "unanswered", _short(messages[-1].text)


def empty_texts(messages: Sequence[Message], layout: Layout) -> Iterator[Problem]:
    """Questions and answers of nothing but white space."""
    is_plain_text = all(not message.text for message in messages if message.role == "user")
    for message in messages:
        if message.text.strip():
            continue
        if message.role == "assistant" and not message.calls_tools:
            yield "empty-answer", ""
        if message.role == "user" and not (TURNS in layout.fields.values() and is_plain_text):
            yield "empty-question", ""


_PLACEHOLDERS = {"nan", "null", "undefined", "[object object]", "<missing>", "#n/a", "#ref!"}


def placeholders(messages: Sequence[Message], layout: Layout) -> Iterator[Problem]:
    """Answers that a failed conversion has left behind."""
    for message in messages:
        if message.role == "assistant" and message.text.strip().lower() in _PLACEHOLDERS:
            yield "placeholder", repr(message.text.strip())


_TEMPLATE_TOKEN = re.compile(
    r"<\|[A-Za-z_]+\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<eo[ahcm]>|<reserved_\d+>"
    r"|<｜[^｜]{1,30}｜>"
)


def template_tokens(messages: Sequence[Message], layout: Layout) -> Iterator[Problem]:
    """Markers of a chat template that stand inside a text."""
    if layout.name == "msagent_react":
        return  # its raw values hold markers that the map function takes out
    for message in messages:
        match = _TEMPLATE_TOKEN.search(message.text)
        if match:
            yield "template-token", f"{match.group()} ({message.role})"


# Joiners (U+200C, U+200D) belong to Persian, Indian languages and emoji, so they are fine.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u2060\u202a-\u202e\u2066-\u2069\ufeff]"
)
_BROKEN = re.compile("[\ufffd\ud800-\udfff]")


def characters(messages: Sequence[Message], layout: Layout) -> Iterator[Problem]:
    """Invisible characters, and broken ones."""
    for code, pattern in (("invisible", _INVISIBLE), ("broken-unicode", _BROKEN)):
        for message in messages:
            match = pattern.search(message.text)
            if match:
                yield code, f"U+{ord(match.group()):04X} ({message.role})"
                break


def open_code_blocks(messages: Sequence[Message], layout: Layout) -> Iterator[Problem]:
    """Answers with an opening ``` and no closing one."""
    for message in messages:
        if message.role == "assistant" and message.text.count("```") % 2:
            yield "open-code-block", _short(message.text[-40:])


MESSAGE_CHECKS: Sequence[Callable[[Sequence[Message], Layout], Iterator[Problem]]] = (
    answers,
    empty_texts,
    placeholders,
    template_tokens,
    characters,
    open_code_blocks,
)


def same_choice(row: Mapping[str, Any]) -> Iterator[Problem]:
    """Preference pairs without a difference."""
    if row["chosen"] == row["rejected"]:
        yield "same-choice", ""


def images(row: Mapping[str, Any], messages: Sequence[Message], folder: str) -> Iterator[Problem]:
    """Images that are not there, and ``<image>`` where it does not belong or is missing."""
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    for name in names:
        if not (Path(folder) / name).is_file():
            yield "missing-image", str(Path(folder) / name)
    marks = sum(message.text.count("<image>") for message in messages if message.role == "user")
    if marks != len(names):
        detail = f"<image>: {marks}, image: {len(names)}"
        yield "image-mark", detail


def images_in_text(row: Mapping[str, Any], messages: Sequence[Message]) -> Iterator[Problem]:
    """Marks of images, or images, in a dataset that has none."""
    named = next((key for key in ("image", "images") if row.get(key)), None)
    if named:
        yield "image-in-text", repr(named)
    elif any(DEFAULT_IMAGE_TOKEN in message.text for message in messages):
        yield "image-in-text", DEFAULT_IMAGE_TOKEN


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:39] + "…"
