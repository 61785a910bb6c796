"""A problem of a config, the rules that find problems, and the config as rules see it."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from xtuner.config.check.code import ERROR, Code
from xtuner.config.document import ConfigDocument
from xtuner.config.values import has_key, iter_dicts, name_of, value_at
from xtuner.utils.errors import Where
from xtuner.utils.lang import tr


@dataclass(frozen=True)
class Problem:
    """One mistake: a code such as ``XT0302``, how bad it is, where, what, and what to do."""

    code: str
    severity: str
    where: Where
    column: int | None
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        place = f"{self.where.file}:{self.where.line or 1}:{self.column or 1}"
        key = f" [{self.where.key}]" if self.where.key else ""
        hint = f"\n    {self.hint}" if self.hint else ""
        severity = tr("error") if self.severity == ERROR else tr("warning")
        return f"{place}: {severity} {self.code}: {self.message}{key}{hint}"

    def as_json(self) -> dict[str, Any]:
        """Flat, for editors and CI."""
        place = asdict(self.where)
        return {
            "code": self.code,
            "severity": self.severity,
            **place,
            "column": self.column,
            "message": self.message,
            "hint": self.hint,
        }


@dataclass(frozen=True)
class Finding:
    """What a rule yields: the key at fault, what is wrong with it, and what to do.

    ``at_key`` says that the key itself is wrong, not its value, which may be written elsewhere.
    """

    key: str
    message: str
    hint: str | None = None
    at_key: bool = False


class Context:
    """A config as rules see it: values by dotted key, imported names by what they are called."""

    def __init__(self, document: ConfigDocument) -> None:
        self.source = document.source
        self.original = document.original
        self.values = document.values
        self._dicts = [
            pair for key, value in self.values.items() for pair in iter_dicts(value, key)
        ]

    def get(self, key: str, default: object = None) -> Any:
        """The value of a dotted key; imported names stay lazy."""
        path = key.split(".")
        return value_at(self.values, path) if has_key(self.values, path) else default

    def kind(self, key: str) -> str:
        """The name that ``type`` has at a key, '' if there is none."""
        return name_of(self.get(f"{key}.type"))

    def typed(self, *kinds: str) -> Iterator[str]:
        """The keys of all dicts whose ``type`` is one of these, each shared dict once."""
        seen = set()
        for key, value in self.dicts():
            if name_of(dict.get(value, "type")) in kinds:
                place = self.place(key)
                if place is None or place not in seen:
                    seen.add(place)
                    yield key

    def dicts(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """All dicts inside the sections, with their keys."""
        return iter(self._dicts)

    @functools.cached_property
    def names_read(self) -> set[str]:
        """The names that the file reads, with the overrides or before them."""
        trees = {id(source.tree): source.tree for source in (self.source, self.original)}
        return {
            node.id
            for tree in trees.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        }

    def place(self, key: str, at_key: bool = False) -> tuple[int, int] | None:
        """Line and column of where a key's value is written, or of the key itself."""
        path = key.split(".")
        return self.source.key_place(path) if at_key else self.source.place(path)


RuleFunction = Callable[[Context], Iterator[Finding]]


@dataclass(frozen=True)
class Rule(Code):
    """A code with the function that finds its problems."""

    find: RuleFunction


RULES: dict[str, Rule] = {}


def rule(
    code: str, severity: str, title: str, reason: str, *, wrong: str, right: str
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule under its code.

    Args:
        code: such as ``XT0302``.
        severity: ``ERROR`` or ``WARNING``.
        title: what is wrong, in a few words, marked with ``N_``.
        reason: why, and what to do, marked with ``N_``.
        wrong: lines of a config in which the rule finds a problem.
        right: the same lines without the problem.
    """

    def register(function: RuleFunction) -> RuleFunction:
        assert code not in RULES, f"{code} is taken"
        RULES[code] = Rule(code, severity, title, reason, wrong, right, function)
        return function

    return register
