"""Names that a config uses but does not define, each with the name that was probably meant."""

from __future__ import annotations

import ast
import builtins
import difflib
import symtable
from collections.abc import Iterator
from dataclasses import dataclass

from xtuner.config.edit import with_expressions
from xtuner.config.source import ConfigSource


@dataclass(frozen=True)
class Undefined:
    """A use of a name that nothing defines, and the defined name that is most similar."""

    node: ast.Name
    meant: str | None


def undefined_names(source: ConfigSource) -> list[Undefined]:
    """Every use of a name that the file neither assigns nor imports, by line.

    A file that imports ``*`` may have any name: nothing is found there.
    """
    if "*" in source.imported():
        return []
    table = symtable.symtable(source.text, source.file, "exec")
    defined = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    missing = set(_globals_read(table)) - defined - set(dir(builtins)) - {"__file__"}
    uses = [
        node
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in missing
    ]
    return [
        Undefined(node, _nearest(node, source, defined))
        for node in sorted(uses, key=lambda node: (node.lineno, node.col_offset))
    ]


def with_meant_names(source: ConfigSource, found: list[Undefined]) -> ConfigSource | None:
    """The text with the names that were probably meant; None if one of them is not known."""
    edits: list[tuple[ast.expr, str]] = []
    for use in found:
        # Python 3.11 has no right positions for names inside f-strings.
        if use.meant is None or source.segment(use.node) != use.node.id:
            return None
        edits.append((use.node, use.meant))
    return with_expressions(source, edits)


def _globals_read(table: symtable.SymbolTable) -> Iterator[str]:
    """The names that a scope, and those in it, look up outside of functions."""
    top = table.get_type() == "module"
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (top or symbol.is_global()):
            yield symbol.get_name()
    for child in table.get_children():
        yield from _globals_read(child)


def _nearest(node: ast.Name, source: ConfigSource, defined: set[str]) -> str | None:
    """The most similar name that has a value where this one is used."""
    before = {
        name
        for name in defined - source.imported()
        if any((a.end_lineno or a.lineno) < node.lineno for a in source.assignments(name))
    }
    near = difflib.get_close_matches(node.id, sorted(before | source.imported()), n=1, cutoff=0.75)
    return near[0] if near else None
