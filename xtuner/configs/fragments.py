"""Parts of a config as text: reading them, filling placeholders, finding free names.

A part is a Python file in ``parts``. Names that end in ``_HERE`` are placeholders: ``MAP_FN_HERE``
takes one expression; ``**FIELDS_HERE`` takes any number of keyword arguments, none included. All
other free names of a part are settings.
"""

from __future__ import annotations

import ast
import builtins
import functools
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PARTS = Path(__file__).parent / "parts"
_FIELDS = re.compile(r"^( *)\*\*([A-Z0-9_]+_HERE),\n", re.MULTILINE)
_MORE_FIELDS = re.compile(r", \*\*([A-Z0-9_]+_HERE)")
_PLACEHOLDER = re.compile(r"\b[A-Z][A-Z0-9_]*_HERE\b")


Placeholders = Mapping[str, str | Mapping[str, str]]
"""Placeholder without ``_HERE`` -> an expression; for a ``**`` placeholder, keyword arguments."""


@dataclass(frozen=True)
class Fragment:
    """A piece of Python: its text, and the module of each name that it imports.

    ``modules[name]`` is ``""`` for a module that is imported as a whole (``import torch``).
    """

    text: str
    modules: Mapping[str, str]


BUILTINS = frozenset(vars(builtins))


@functools.cache
def part(name: str) -> Fragment:
    """Read ``parts/<name>.py``: its text without docstring and imports, and its imports."""
    source = (PARTS / f"{name}.py").read_text("utf-8")
    modules: dict[str, str] = {}
    tree = ast.parse(source)
    head = 0
    for node in tree.body:
        if isinstance(node, ast.Import):
            modules.update({alias.name: "" for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            modules.update({alias.name: node.module or "" for alias in node.names})
        elif not isinstance(node, ast.Expr):
            break
        head = node.end_lineno or 0
    return Fragment("".join(source.splitlines(keepends=True)[head:]).strip("\n") + "\n", modules)


def filled(fragment: Fragment, placeholders: Placeholders) -> Fragment:
    """Fill the placeholders of a part.

    Args:
        fragment: the part.
        placeholders: what to put in; placeholders that the part does not have are ignored.

    Raises:
        KeyError: for a placeholder without a value.
    """

    def fields(match: re.Match[str]) -> str:
        values = placeholders[match[2].removesuffix("_HERE")]
        assert isinstance(values, Mapping), match[2]
        text = "".join(f"{key}={value},\n" for key, value in values.items())
        return textwrap.indent(text, match[1])

    def more_fields(match: re.Match[str]) -> str:
        values = placeholders[match[1].removesuffix("_HERE")]
        assert isinstance(values, Mapping), match[1]
        return "".join(f", {key}={value}" for key, value in values.items())

    text = _MORE_FIELDS.sub(more_fields, _FIELDS.sub(fields, fragment.text))
    lines = []
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        for placeholder in _PLACEHOLDER.findall(line):
            value = placeholders[placeholder.removesuffix("_HERE")]
            assert isinstance(value, str), placeholder
            line = line.replace(placeholder, value.replace("\n", "\n" + indent))
        lines.append(line)
    return Fragment("\n".join(lines) + "\n", fragment.modules)


def expression(fragment: Fragment) -> str:
    """The right-hand side of a part that is one assignment, for a placeholder of another part."""
    return fragment.text.partition(" = ")[2].rstrip("\n")


@functools.lru_cache(maxsize=4096)
def names_in(source: str) -> tuple[frozenset[str], frozenset[str]]:
    """The names that a piece of Python reads, builtins left out, and those that it assigns."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    read = frozenset(node.id for node in nodes if isinstance(node.ctx, ast.Load))
    assigned = frozenset(node.id for node in nodes if isinstance(node.ctx, ast.Store))
    return read - BUILTINS, assigned


def import_lines(names: set[str], modules: Mapping[str, str]) -> str:
    """The import statements for ``names``: sorted as ruff does, 88 wide."""
    whole = sorted(name for name in names if modules[name] == "")
    by_module: dict[str, list[str]] = {}
    for name in names - set(whole):
        by_module.setdefault(modules[name], []).append(name)
    lines = [f"import {name}" for name in whole]
    for module in sorted(by_module):
        members = sorted(by_module[module], key=_import_order)
        line = f"from {module} import {', '.join(members)}"
        if len(line) > 88:
            line = f"from {module} import (\n    " + ",\n    ".join(members) + ",\n)"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _import_order(name: str) -> tuple[int, str]:
    """isort's order: constants, then classes, then functions."""
    if name.isupper():
        return 0, name
    return (1 if name[0].isupper() else 2), name


def renamed(fragment: Fragment, old: str, new: str) -> Fragment:
    """A fragment that uses the name ``new`` of the same module in place of ``old``."""
    text = re.sub(rf"\b{old}\b", new, fragment.text)
    modules = {new if name == old else name: module for name, module in fragment.modules.items()}
    return Fragment(text, modules)
