"""Where a value of a config comes from: the lines it passes through, and what overrode it."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from mmengine.config import Config

from xtuner.config.dump import own_values
from xtuner.config.load import load_source, override, raw_dict, read_source
from xtuner.config.options import suggest
from xtuner.config.source import Source, value_at
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr


@dataclass(frozen=True)
class Origin:
    """One step on the way of a value: ``key = text`` at a line of a file."""

    file: str
    line: int
    key: str
    text: str
    note: str = ""

    def __str__(self) -> str:
        note = f"    # {self.note}" if self.note else ""
        return f"{self.file}:{self.line}: {self.key} = {self.text}{note}"


def provenance_of(name_or_path: str, key: str, options: Sequence[str] = ()) -> list[Origin]:
    """Follow a key to where its value is written.

    Args:
        name_or_path: a config.
        key: a dotted key.
        options: ``--cfg-options`` words.

    Returns:
        The steps, the key first; the last ones are what its value is computed from.

    Raises:
        UserError: when the config has no such key, with the nearest one.
    """
    original = source = read_source(name_or_path)
    cfg = load_source(source)
    if options:
        source, cfg = override(source, cfg, options)
    path = key.split(".")
    _refuse_unknown(cfg, path, source)
    steps = _steps(source, original, path)
    if not steps:
        raise UserError(
            tr("'{key}' is set in a base of this file", key=key),
            where=Where(source.file),
        )
    return steps


def _refuse_unknown(cfg: Config, path: list[str], source: Source) -> None:
    try:
        value_at(own_values(cfg), path)
    except KeyError as error:
        near = suggest(path[-1], (path[-1],), own_values(cfg), raw_dict(cfg))
        raise UserError(
            tr("there is no key '{key}'", key=".".join(path)),
            hint=tr("did you mean {near}?", near=near) if near else None,
            where=Where(source.file),
        ) from error


def _steps(source: Source, original: Source, path: Sequence[str]) -> list[Origin]:
    """The trace of a key, then those of the settings that its expression is computed from."""
    trace = source.trace(path)
    steps = [_origin(source, original, step.key, step.line, step.node) for step in trace]
    if trace and not isinstance(trace[-1].node, ast.Name):
        last = trace[-1].node
        if isinstance(last, ast.BinOp | ast.IfExp | ast.Compare | ast.UnaryOp):
            names = [n.id for n in ast.walk(last) if isinstance(n, ast.Name)]
            for name in dict.fromkeys(names):
                if source.assignments(name) and name != path[0]:
                    steps += _steps(source, original, [name])
    return steps


def _origin(source: Source, original: Source, key: str, line: int, node: ast.expr) -> Origin:
    text = " ".join(source.segment(node).split())
    before = original.find(key.split("."))
    if before is None or before.rest:
        return Origin(source.file, line, key, text, _overridden(None))
    old = " ".join(original.segment(before.node).split())
    note = _overridden(old) if old != text and len(text) < 200 else ""
    return Origin(source.file, line, key, text if len(text) <= 200 else text[:197] + "...", note)


def _overridden(old: str | None) -> str:
    by = tr("from --cfg-options")
    return by + (tr(", the file says {old}", old=old) if old else "")
