"""Bring the message catalogues up to date with the source: ``make messages``.

Collects the English messages of ``xtuner/``, merges them into each ``.po`` file (translations are
kept, new messages come in untranslated, those no longer used are dropped) and compiles the ``.mo``
file beside it. Exits with status 1 while a message has no translation.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from babel.messages import Catalog
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "xtuner"
KEYWORDS = {"tr": 0, "N_": 0, "UnknownConfig": 1}
"""Functions whose argument at this position is a message."""


class Use(NamedTuple):
    """One call with a message: where it is and what it passes."""

    place: str
    function: str
    message: str | None
    """None when the argument is not a literal."""
    values: list[str | None]
    """Names of the keyword arguments; None stands for ``**``."""


def uses() -> Iterator[Use]:
    """Every call in the package that takes a message."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            position = KEYWORDS.get(node.func.id)
            if position is None:
                continue
            message = node.args[position] if len(node.args) > position else None
            literal = isinstance(message, ast.Constant) and isinstance(message.value, str)
            yield Use(
                f"{file.relative_to(ROOT)}:{node.lineno}",
                node.func.id,
                message.value if literal else None,
                [keyword.arg for keyword in node.keywords],
            )


def read(file: Path) -> Catalog:
    """A ``.po`` file."""
    with file.open("rb") as stream:
        return read_po(stream, locale=file.parent.parent.name, domain=file.stem)


def update(file: Path) -> list[str]:
    """Merge the messages of the source into a ``.po`` file and compile it.

    Returns:
        The messages without a translation.
    """
    template = Catalog()
    for use in uses():
        if use.message is not None:
            template.add(use.message)
    catalog = read(file)
    catalog.update(template, no_fuzzy_matching=True, update_creation_date=False)
    with file.open("wb") as stream:
        write_po(stream, catalog, width=None, sort_output=True, ignore_obsolete=True)
    with file.with_suffix(".mo").open("wb") as stream:
        write_mo(stream, catalog)
    return [message.id for message in catalog if message.id and not message.string]


def main() -> int:
    missing = {file: update(file) for file in sorted(PACKAGE.glob("locale/*/LC_MESSAGES/*.po"))}
    for file, messages in missing.items():
        for message in messages:
            print(f"{file.relative_to(ROOT)}: no translation of {message!r}")
    return int(any(missing.values()))


if __name__ == "__main__":
    sys.exit(main())
