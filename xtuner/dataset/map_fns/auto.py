"""One map function for the common layouts, recognised by their fields."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.dataset.map_fns.dataset_map_fns.dialogue import oasst1_map_fn, openai_map_fn
from xtuner.dataset.map_fns.dataset_map_fns.single_turn import (
    alpaca_map_fn,
    alpaca_zh_map_fn,
    default_map_fn,
    pretrain_map_fn,
)
from xtuner.tokenization.roles import ANY, CALLS, OPENAI

PAIRS = (
    ("query", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
)
"""Names of a question and its answer, each in a field."""
_KEPT = ("loss", "tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning")
"""What of a message goes on besides its role and content."""


def auto_map_fn(example: Mapping[str, Any]) -> dict[str, Any]:
    """Recognise a row's layout and map it.

    Args:
        example: a row with ``conversation``, ``messages``, ``conversations`` (ShareGPT in any
            common spelling, under either key, also with calls of tools and a column ``system``),
            ``instruction``/``output`` (also with ``history`` and ``system``), their ``_zh``,
            ``input``/``output``, one of ``PAIRS`` (as in ms-swift also with ``history`` and
            ``system``), or ``text``.

    Returns:
        ``conversation``; for ShareGPT rows also ``messages``, which the tokenizer's own template
        renders with their tools.

    Raises:
        ValueError: when no layout fits.
    """
    example = {name: value for name, value in example.items() if value is not None}
    if "conversation" in example:
        return {"conversation": example["conversation"]}
    if "messages" in example and _has_openai_roles(example["messages"]):
        return openai_map_fn(example)
    if "messages" in example or "conversations" in example:
        messages = _openai_messages(example.get("messages") or example["conversations"])
        if example.get("system") and messages[:1] and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": example["system"]})
        return openai_map_fn({"messages": messages}) | {"messages": messages}
    if "instruction" in example:
        plain = {**example, "input": example.get("input") or ""}
        return _with_history(example, alpaca_map_fn(plain))
    if "instruction_zh" in example:
        return alpaca_zh_map_fn(example)
    if "input" in example and "output" in example:
        return default_map_fn(example)
    pair = next((pair for pair in PAIRS if all(name in example for name in pair)), None)
    if pair:
        ask, answer = (example[name] for name in pair)
        turn = {"input": ask, "output": answer}
        return _with_history(example, {"conversation": [turn]})
    if "text" in example:
        looks_like_oasst = "### Human:" in str(example["text"])
        return oasst1_map_fn(example) if looks_like_oasst else pretrain_map_fn(example)
    raise ValueError(f"no known layout has the fields {', '.join(example)}")


def _with_history(example: Mapping[str, Any], mapped: dict[str, Any]) -> dict[str, Any]:
    """LLaMA-Factory's columns beside alpaca's: ``history`` of [question, answer], ``system``."""
    earlier = [_earlier_turn(pair) for pair in example.get("history") or ()]
    if not mapped["conversation"] or not (earlier or example.get("system")):
        return mapped
    turns: list[dict[str, Any]] = [*earlier, *mapped["conversation"]]
    if example.get("system"):
        turns[0] = {**turns[0], "system": example["system"]}
    return {"conversation": turns}


def _earlier_turn(pair: object) -> dict[str, Any]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise ValueError(f"'history' holds {pair!r:.40}, expected [question, answer]")
    return {"input": pair[0], "output": pair[1]}


def _has_openai_roles(messages: Sequence[Mapping[str, Any]]) -> bool:
    return all(message.get("role") in OPENAI for message in messages)


def _openai_messages(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in any spelling as OpenAI's; calls of tools belong to the answer before them."""
    messages: list[dict[str, Any]] = []
    for item in items:
        message = sharegpt_message(item)
        calls = message.get("tool_calls")
        if calls and not message["content"] and messages and messages[-1]["role"] == "assistant":
            messages[-1]["tool_calls"] = [*messages[-1].get("tool_calls", ()), *calls]
        else:
            messages.append(message)
    return messages


def sharegpt_message(item: Mapping[str, Any]) -> dict[str, Any]:
    """A message of ShareGPT in any common spelling as OpenAI's.

    Raises:
        ValueError: when its role is unknown.
    """
    who = str(item.get("from", item.get("role", ""))).lower()
    if who not in ANY:
        raise ValueError(f"'from' is {who!r}, expected one of {', '.join(ANY)}")
    content = item.get("value", item.get("content"))
    calls = _calls(content) if who in CALLS else []
    if calls:
        functions = [{"function": call} for call in calls]
        return {"role": ANY[who], "content": "", "tool_calls": functions}
    kept = {key: item[key] for key in _KEPT if item.get(key) is not None}
    return {"role": ANY[who], "content": content, **kept}


def _calls(content: object) -> list[dict[str, Any]]:
    """The calls of tools in a JSON text, an object or a list of them; empty when it is none."""
    try:
        found = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        return []
    calls: list[Any] = found if isinstance(found, list) else [found]
    return calls if all(isinstance(call, dict) and "name" in call for call in calls) else []
