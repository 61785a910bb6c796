"""Where a value of a config comes from: the lines it passes through, and what overrode it."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from xtuner.config.document import ConfigDocument
from xtuner.config.options import suggest
from xtuner.config.source import Step
from xtuner.config.values import KeyPath, has_key, value_at
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

MAX_TEXT = 200
"""Characters of an expression that are shown."""


@dataclass(frozen=True)
class Origin:
    """One step from a key to where its value is written: ``key = text`` at a line of a file."""

    file: str
    line: int
    key: str
    text: str
    note: str = ""

    def __str__(self) -> str:
        note = f"    # {self.note}" if self.note else ""
        return f"{self.file}:{self.line}: {self.key} = {self.text}{note}"


def provenance_of(document: ConfigDocument, key: str) -> list[Origin]:
    """Follow a key to where its value is written.

    Args:
        document: a loaded config, overrides applied.
        key: a dotted key.

    Returns:
        The steps, the key first; the last ones are what its value is computed from.

    Raises:
        UserError: when the config has no such key, with the nearest one.
    """
    path = key.split(".")
    _refuse_unknown(document, path)
    if not document.is_python:
        value = value_at(document.values, path)
        return [Origin(document.file, 1, key, repr(value))]
    steps = _steps(document, path)
    if not steps:
        raise UserError(
            tr("'{key}' is set in a base of this file", key=key), where=Where(document.file)
        )
    return steps


def _refuse_unknown(document: ConfigDocument, path: list[str]) -> None:
    if has_key(document.values, path):
        return
    near = suggest(path[-1], (path[-1],), document.values, document.raw)
    raise UserError(
        tr("there is no key '{key}'", key=".".join(path)),
        hint=tr("did you mean {near}?", near=near) if near else None,
        where=Where(document.file),
    )


def _steps(document: ConfigDocument, path: KeyPath) -> list[Origin]:
    """The trace of a key, then those of the settings that its expression is computed from."""
    source = document.source
    trace = source.trace(path)
    steps = [_origin(document, step) for step in trace]
    if trace and not isinstance(trace[-1].node, ast.Name):
        last = trace[-1].node
        if isinstance(last, ast.BinOp | ast.IfExp | ast.Compare | ast.UnaryOp):
            names = [n.id for n in ast.walk(last) if isinstance(n, ast.Name)]
            for name in dict.fromkeys(names):
                if source.assignments(name) and name != path[0]:
                    steps += _steps(document, [name])
    return steps


def _origin(document: ConfigDocument, step: Step) -> Origin:
    source, original = document.source, document.original
    text = " ".join(source.segment(step.node).split())
    shown = text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."
    before = original.find(step.key.split("."))
    if before is None or before.rest:
        return Origin(source.file, step.line, step.key, shown, _overridden(None))
    old = " ".join(original.segment(before.node).split())
    note = _overridden(old) if old != text and len(text) < MAX_TEXT else ""
    return Origin(source.file, step.line, step.key, shown, note)


def _overridden(old: str | None) -> str:
    by = tr("from --cfg-options")
    return by + (tr(", the file says {old}", old=old) if old else "")
