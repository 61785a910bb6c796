"""Rows of real text that every machine has: English, Chinese, code, and conversations of all three.

English are the docstrings of the standard library, Chinese the documentation of this project in
Chinese, code the source of this package. Rows are ``{'messages': [...]}``.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUESTION, SHORTEST = 200, 40
"""Characters of a question at most, and of a text at least."""
CODE_LINES = 30
TURNS = 4
"""Of a conversation; all other rows have one."""


def english() -> list[str]:
    """The docstrings of the standard library."""
    found: list[str] = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in file.parts:
            found += _docstrings(file)
    return found


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text("utf-8"))
    except (SyntaxError, ValueError):  # files that test the parser
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) > SHORTEST:
                yield text


def chinese() -> list[str]:
    """The paragraphs of this project's Chinese documentation."""
    files = sorted((ROOT / "docs" / "zh_cn").rglob("*.md"))
    paragraphs = [text for file in files for text in file.read_text("utf-8").split("\n\n")]
    return [text for text in paragraphs if len(text) > SHORTEST]


def code() -> list[str]:
    """The source of this package, ``CODE_LINES`` lines at a time."""
    found = []
    for file in sorted((ROOT / "xtuner").rglob("*.py")):
        lines = file.read_text("utf-8").split("\n")
        found += ["\n".join(lines[i : i + CODE_LINES]) for i in range(0, len(lines), CODE_LINES)]
    return [text for text in found if len(text) > SHORTEST]


def corpora(seed: int = 0) -> dict[str, list[str]]:
    """The texts of each kind in random order; ``multi_turn`` has the same amount of each."""
    texts = {"english": english(), "chinese": chinese(), "code": code()}
    draw = random.Random(seed)
    for each in texts.values():
        draw.shuffle(each)
    size = min(sum(map(len, each)) for each in texts.values())
    mixed = [text for each in texts.values() for text in _first(each, size)]
    draw.shuffle(mixed)
    return {**texts, "multi_turn": mixed}


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Texts from the front until they have so many characters."""
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def conversations(kind: str, texts: list[str]) -> list[list[tuple[str, str]]]:
    """Questions and answers made of pairs of texts, ``TURNS`` to a conversation of many turns."""
    pairs = [(a[:QUESTION], b) for a, b in zip(texts[::2], texts[1::2], strict=False)]
    turns = TURNS if kind == "multi_turn" else 1
    return [pairs[i : i + turns] for i in range(0, len(pairs) - turns + 1, turns)]


def write_rows(file: Path, count: int) -> None:
    """Write rows of all kinds, in random order; texts come again where there are not enough."""
    talks = [talk for kind, texts in corpora().items() for talk in conversations(kind, texts)]
    random.Random(0).shuffle(talks)
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            messages = []
            for question, answer in talks[number % len(talks)]:
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answer})
            stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
