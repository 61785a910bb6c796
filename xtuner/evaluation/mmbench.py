"""MMBench: its questions from the TSV, the letter in an answer, and the score."""

from __future__ import annotations

import csv
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

LETTERS = ("A", "B", "C", "D")
CIRCLE = 1_000_000
"""Rows whose index is equal modulo this are one question with its options in another order."""
NEEDED = ("index", "question", "A", "B", "image")


def read_questions(file: str) -> list[dict[str, str]]:
    """The rows of an MMBench TSV.

    Raises:
        UserError: when it cannot be read or lacks a column.
    """
    csv.field_size_limit(sys.maxsize)
    try:
        with Path(file).open(encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened, delimiter="\t"))
    except OSError as error:
        raise UserError(
            tr("the questions cannot be read: {strerror}", strerror=error.strerror),
            where=Where(file),
        ) from error
    missing = [name for name in NEEDED if not rows or name not in rows[0]]
    if missing:
        raise UserError(
            tr("this is no MMBench TSV: it has no {missing}", missing=", ".join(missing)),
            where=Where(file),
        )
    return rows


def options_of(row: Mapping[str, Any]) -> dict[str, str]:
    """The options that a question has, by letter."""
    return {
        letter: str(row[letter])
        for letter in LETTERS
        if row.get(letter) not in (None, "", "nan", "NaN")
    }


def question_text(row: Mapping[str, Any], chinese: bool = False) -> str:
    """A question as the model gets it: hint, question, options, and how to answer."""
    hint = row.get("hint")
    lines = [str(hint)] if hint and hint != "nan" else []
    lines.append(str(row["question"]))
    lines += [f"{letter}. {text}" for letter, text in options_of(row).items()]
    lines.append(
        "请直接回答选项字母。"
        if chinese
        else "Answer with the option's letter from the given choices directly."
    )
    return "\n".join(lines)


def letter_in(answer: str) -> str:
    """The first letter from A to D in an answer; empty when there is none."""
    found = re.search(r"[A-D]", answer)
    return found[0] if found else ""


def scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Shares of questions whose every order of options was answered rightly.

    Args:
        rows: with ``index``, ``answer``, ``prediction`` and where given ``category`` and
            ``l2-category``.

    Returns:
        ``Average``, and by the names of categories.
    """
    questions: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        questions[int(row["index"]) % CIRCLE].append(row)
    right = {
        number: all(letter_in(str(row["prediction"])) == row["answer"] for row in group)
        for number, group in questions.items()
    }
    found = {"Average": _share(right.values())}
    for column in ("l2-category", "category"):
        names = sorted({str(g[0][column]) for g in questions.values() if g[0].get(column)})
        for name in names:
            members = [n for n, g in questions.items() if str(g[0].get(column)) == name]
            found[name] = _share(right[number] for number in members)
    return found


def _share(values: Iterable[bool]) -> float:
    listed = list(values)
    return sum(listed) / max(1, len(listed))
