"""One map function for the common layouts, recognised by their fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtuner.dataset.map_fns.dataset_map_fns.dialogue import oasst1_map_fn, openai_map_fn
from xtuner.dataset.map_fns.dataset_map_fns.single_turn import (
    alpaca_map_fn,
    alpaca_zh_map_fn,
    default_map_fn,
    pretrain_map_fn,
)
from xtuner.tokenization.roles import ANY


def auto_map_fn(example: Mapping[str, Any]) -> dict[str, Any]:
    """Recognise a row's layout and map it.

    Args:
        example: a row with ``conversation``, ``messages``, ``conversations`` (ShareGPT in any
            common spelling), ``instruction``/``output``, their ``_zh``, ``input``/``output``, or
            ``text``.

    Raises:
        ValueError: when no layout fits.
    """
    if "conversation" in example:
        return {"conversation": example["conversation"]}
    if "messages" in example:
        return openai_map_fn(example)
    if "conversations" in example:
        return openai_map_fn({"messages": [_message(item) for item in example["conversations"]]})
    if "instruction" in example:
        return alpaca_map_fn({"input": "", **example})
    if "instruction_zh" in example:
        return alpaca_zh_map_fn(example)
    if "input" in example and "output" in example:
        return default_map_fn(example)
    if "text" in example:
        looks_like_oasst = "### Human:" in str(example["text"])
        return oasst1_map_fn(example) if looks_like_oasst else pretrain_map_fn(example)
    raise ValueError(f"no known layout has the fields {', '.join(example)}")


def _message(item: Mapping[str, Any]) -> dict[str, Any]:
    who = str(item.get("from", item.get("role", ""))).lower()
    if who not in ANY:
        raise ValueError(f"'from' is {who!r}, expected one of {', '.join(ANY)}")
    return {"role": ANY[who], "content": item.get("value", item.get("content"))}
