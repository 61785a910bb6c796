"""Formats with one question and one answer a row: which fields they are in, and the system text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtuner.tokenization.content import text_value
from xtuner.utils.templates import SYSTEM_TEMPLATE

Row = Mapping[str, Any]
Mapped = dict[str, list[dict[str, Any]]]


def _turn(question: str, answer: str, system: str | None = None) -> Mapped:
    turn = {"input": text_value(question), "output": answer}
    return {"conversation": [turn if system is None else {"system": system, **turn}]}


def _given(text: str | None) -> str:
    """``input`` may be null: Arrow gives None for a field that only other rows have."""
    return "" if text is None else text


def _two(first: str, second: str) -> str:
    return f"{text_value(first)}\n{text_value(second)}"


def alpaca_map_fn(example: Row) -> Mapped:
    """``instruction``, ``input`` → ``output``; a row whose output is ``<nooutput>`` is dropped."""
    if example.get("output") == "<nooutput>":
        return {"conversation": []}
    return _turn(_two(example["instruction"], _given(example["input"])), example["output"])


def alpaca_zh_map_fn(example: Row) -> Mapped:
    """``instruction_zh``, ``input_zh`` → ``output_zh``."""
    return _turn(_two(example["instruction_zh"], _given(example["input_zh"])), example["output_zh"])


def arxiv_map_fn(example: Row) -> Mapped:
    """``abstract`` → ``title``."""
    return _turn(example["abstract"], example["title"], SYSTEM_TEMPLATE.arxiv_gentile)


def code_alpaca_map_fn(example: Row) -> Mapped:
    """``prompt`` → ``completion``."""
    return _turn(example["prompt"], example["completion"], SYSTEM_TEMPLATE.coder)


def colors_map_fn(example: Row) -> Mapped:
    """``description`` after its first colon → ``color``."""
    description = str(text_value(example["description"])).partition(":")[2].strip()
    return _turn(description, example["color"], SYSTEM_TEMPLATE.colorist)


def crime_kg_assitant_map_fn(example: Row) -> Mapped:
    """``input`` → ``output``, as a lawyer."""
    return _turn(_given(example["input"]), example["output"], SYSTEM_TEMPLATE.lawyer)


def default_map_fn(example: Row) -> Mapped:
    """``input`` → ``output``."""
    return _turn(_given(example["input"]), example["output"])


def law_reference_map_fn(example: Row) -> Mapped:
    """``question`` → ``answer``, as a lawyer."""
    return _turn(example["question"], example["answer"], SYSTEM_TEMPLATE.lawyer)


def medical_map_fn(example: Row) -> Mapped:
    """``instruction``, ``input`` → ``output``, as a doctor."""
    question = _two(example["instruction"], _given(example["input"]))
    return _turn(question, example["output"], SYSTEM_TEMPLATE.medical)


def openorca_map_fn(example: Row) -> Mapped:
    """``question`` → ``response`` with the row's ``system_prompt``."""
    return _turn(example["question"], example["response"], example["system_prompt"])


def pretrain_map_fn(example: Row) -> Mapped:
    """``text``, all of it trained, without an eos."""
    text = str(text_value(example["text"])).strip()
    return {"conversation": [{"input": "", "output": text, "need_eos_token": False}]}


def sql_map_fn(example: Row) -> Mapped:
    """``context``, ``question`` → ``answer``."""
    question = _two(example["context"], example["question"])
    return _turn(question, example["answer"], SYSTEM_TEMPLATE.sql)


def stack_exchange_map_fn(example: Row) -> Mapped:
    """``question`` → ``response``."""
    return _turn(example["question"], example["response"])


def tiny_codes_map_fn(example: Row) -> Mapped:
    """``prompt`` → ``response``, as a programmer."""
    return _turn(example["prompt"], example["response"], SYSTEM_TEMPLATE.coder)
