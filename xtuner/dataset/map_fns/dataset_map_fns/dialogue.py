"""Formats with several messages a row: ShareGPT-like, OpenAI, Open Assistant and LLaVA."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from xtuner.tokenization.content import content_of, has_loss, text_of, text_value
from xtuner.utils.constants import DEFAULT_IMAGE_TOKEN

Row = Mapping[str, Any]
Mapped = dict[str, list[dict[str, Any]]]

_OASST_MARK = re.compile(r"### (Human|Assistant):")


def wizardlm_map_fn(example: Row) -> Mapped:
    """``conversations`` of ``{from: human | gpt, value}``."""
    return {"conversation": list(_turns(example["conversations"]))}


def llava_map_fn(example: Row) -> Mapped:
    """As ``wizardlm``; ``<image>`` in a question moves to its front.

    Where a row has several images, their marks stay: the text tells which is where.
    """
    turns = list(_turns(example["conversations"]))
    images = example.get("image")
    if isinstance(images, list) and len(images) > 1:
        return {"conversation": turns}
    for turn in turns:
        if DEFAULT_IMAGE_TOKEN in turn["input"]:
            rest = turn["input"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
            turn["input"] = f"{DEFAULT_IMAGE_TOKEN}\n{rest}".strip()
    return {"conversation": turns}


def llava_image_only_map_fn(example: Row) -> Mapped:
    """As ``wizardlm``; each human message is the image alone."""
    messages = [
        {**message, "value": DEFAULT_IMAGE_TOKEN} if message["from"] == "human" else message
        for message in example["conversations"]
    ]
    return {"conversation": list(_turns(messages))}


def _turns(messages: Iterable[Row]) -> Iterable[dict[str, Any]]:
    """A turn for each answer; the questions since the last one are joined."""
    question, asked = "", False
    for message in messages:
        if message["value"] is None:
            raise ValueError("a message's 'value' is null")
        if message["from"] == "human":
            question, asked = question + str(text_value(message["value"])), True
        elif message["from"] == "gpt":
            if not asked:
                continue  # an answer to nothing: conversations begin with a question
            yield {"input": question, "output": str(text_value(message["value"]))}
            question = ""
        else:
            raise ValueError(f"'from' is {message['from']!r}, expected 'human' or 'gpt'")


def oasst1_map_fn(example: Row) -> Mapped:
    """``text`` with ``### Human:`` and ``### Assistant:``; a question without answer is dropped."""
    _, *segments = _OASST_MARK.split(example["text"])
    turns = []
    question = ""
    for who, text in zip(segments[::2], segments[1::2], strict=True):
        if who == "Human":
            question = text.strip()
        elif question:
            turns.append({"input": question, "output": text.strip()})
            question = ""
    return {"conversation": turns}


def openai_map_fn(example: Row) -> Mapped:
    """``messages`` of ``{role, content}``, where given with ``loss`` and ``tool_calls``.

    A tool's result is part of the next question; a call of a tool is part of the answer, as JSON.
    """
    turns: list[dict[str, Any]] = []
    system, question, asked = "", "", False
    for message in example["messages"]:
        role, content = message["role"], text_of(content_of(message))
        trained = has_loss(message)
        if role in ("system", "developer"):
            system = content
        elif role in ("user", "tool", "function"):
            question, asked = question + content, True
        elif role == "assistant":
            if not asked:
                continue
            turn = {"input": question, "output": content + _calls(message)}
            if system:
                turn["system"] = system
            turns.append(turn | {"output_with_loss": trained})
            system, question = "", ""
        else:
            raise ValueError(f"'role' is {role!r}, expected system, user, assistant or tool")
    return {"conversation": turns}


def _calls(message: Row) -> str:
    calls = [call.get("function") or call for call in message.get("tool_calls") or ()]
    return "".join(json.dumps(call, ensure_ascii=False) for call in calls)
