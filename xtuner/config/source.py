"""The source text of a config as a syntax tree: which expression gives a key its value, and where.

Read-only; ``edit.py`` makes changed copies.
"""

from __future__ import annotations

import ast
import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

Assignment = ast.Assign | ast.AnnAssign | ast.AugAssign
MAX_STEPS = 20
"""Names that ``trace`` follows, one after the other, before it stops."""


@dataclass(frozen=True)
class SourceSpan:
    """The expression that a key's value comes from.

    Attributes:
        node: the expression.
        rest: the keys that are not written out in it: they are inside what it evaluates to.
    """

    node: ast.expr
    rest: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One step from a key to its value: ``key = <node>`` at a line and column, both from 1."""

    line: int
    column: int
    key: str
    node: ast.expr


class ConfigSource:
    """The source text of a config in Python, parsed.

    Args:
        text: the text; empty for a config that is plain data (YAML, JSON).
        file: the file's name, as messages show it.

    Raises:
        UserError: when the text is not Python, with the line.
    """

    def __init__(self, text: str, file: str) -> None:
        self.text = text
        self.file = file
        try:
            self.tree = ast.parse(text)
        except (SyntaxError, ValueError) as error:
            raise _not_python(error, text, file) from error

    def assignments(self, name: str) -> list[Assignment]:
        """The statements outside functions that give ``name`` a value, in order."""
        return self._assignments.get(name, [])

    @functools.cached_property
    def _assignments(self) -> dict[str, list[Assignment]]:
        by_name: dict[str, list[Assignment]] = {}
        for statement in _statements(self.tree.body):
            if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
                for name in _target_names(statement):
                    by_name.setdefault(name, []).append(statement)
        return by_name

    def imported(self) -> set[str]:
        """The names that the file imports."""
        return {
            (alias.asname or alias.name).partition(".")[0]
            for statement in _statements(self.tree.body)
            if isinstance(statement, ast.Import | ast.ImportFrom)
            for alias in statement.names
        }

    def imports(self) -> Iterator[tuple[str, str, str | None]]:
        """Each import outside functions: the name it gets, the module, the name in the module."""
        for statement in _statements(self.tree.body):
            if isinstance(statement, ast.ImportFrom) and not statement.level:
                for alias in statement.names:
                    if alias.name != "*":
                        yield alias.asname or alias.name, statement.module or "", alias.name
            elif isinstance(statement, ast.Import):
                for alias in statement.names:
                    yield alias.asname or alias.name, alias.name, None

    @functools.cached_property
    def lines(self) -> list[str]:
        """The lines as ``ast`` counts them, without their ends."""
        return split_lines(self.text)

    def find(self, path: Sequence[str]) -> SourceSpan | None:
        """The expression of a key: follow literal dicts and lists from its last assignment.

        Returns:
            None when the file itself does not assign the first name of the path.
        """
        values = self.values_of(path[0])
        if not values:
            return None
        node = values[-1]
        for depth, key in enumerate(path[1:], start=1):
            child = _child(node, key)
            if child is None:
                return SourceSpan(node, tuple(path[depth:]))
            node = child
        return SourceSpan(node)

    def trace(self, path: Sequence[str]) -> list[Step]:
        """The way from a key to where its value is written: each step follows a name.

        Returns:
            The steps, the key itself first; empty when the file does not assign it.
        """
        steps: list[Step] = []
        while span := self.find(path):
            line, column = span.node.lineno, span.node.col_offset + 1
            key = ".".join(path[: len(path) - len(span.rest)])
            steps.append(Step(line, column, key, span.node))
            node: ast.expr = span.node
            if isinstance(node, ast.Call) and is_dict_call(node) and node.args and span.rest:
                node = node.args[0]
            following = isinstance(node, ast.Name) and self.assignments(node.id)
            if not isinstance(node, ast.Name) or not following or len(steps) > MAX_STEPS:
                break
            path = (node.id, *span.rest)
        return steps

    def place(self, path: Sequence[str]) -> tuple[int, int] | None:
        """Line and column (both from 1) of where a key's value is written.

        For a computed value, those of the first setting that it is computed from; for a value
        inside an expression, those of the expression.
        """
        seen: set[str] = set()
        while steps := self.trace(path):
            last = steps[-1]
            seen.add(path[0])
            inner = ast.walk(last.node) if isinstance(last.node, ast.BinOp) else ()
            names = [node.id for node in inner if isinstance(node, ast.Name)]
            settings = [name for name in names if self.assignments(name)]
            if not settings or settings[0] in seen:
                return last.line, last.column
            path = [settings[0]]
        return self._statement_place(path)

    def key_place(self, path: Sequence[str]) -> tuple[int, int] | None:
        """Line and column of the key itself: ``key=...`` in a dict or call."""
        for step in self.trace(path):
            name = step.key.rpartition(".")[2]
            if name == path[-1]:
                line = self.lines[step.line - 1].encode()[: step.column - 1]
                before = len(name) + 1 if line.endswith(f"{name}=".encode()) else 0
                return step.line, step.column - before
        return self.place(path)

    def _statement_place(self, path: Sequence[str]) -> tuple[int, int] | None:
        """The place of the assignment, definition or import of the key's first name."""
        found: list[ast.stmt | ast.alias] = [*self.assignments(path[0])]
        found = found or [
            node
            for node in self.tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == path[0]
        ]
        found = found or [
            alias
            for statement in _statements(self.tree.body)
            if isinstance(statement, ast.Import | ast.ImportFrom)
            for alias in statement.names
            if path[0] in (alias.asname, alias.name)
        ]
        return (found[-1].lineno, found[-1].col_offset + 1) if found else None

    def segment(self, node: ast.AST) -> str:
        """The text of an expression."""
        return ast.get_source_segment(self.text, node) or ast.unparse(node)

    def values_of(self, name: str) -> list[ast.expr]:
        """The expressions that are assigned to a name alone."""
        values = [_value_for(statement, name) for statement in self.assignments(name)]
        return [value for value in values if value is not None]


def split_lines(text: str) -> list[str]:
    """The lines of Python source as ``ast`` counts them, without their ends.

    ``str.splitlines`` also splits at form feeds, U+2028 and the like, which may be part of a string
    or comment; after one of them its line numbers are not those of the syntax tree.
    """
    return re.split(r"\r\n|\r|\n", text)


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements of the module, those under if, for, with and try too."""
    for statement in body:
        yield statement
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for block in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(statement, block, []))


def _targets(statement: Assignment) -> list[ast.expr]:
    return statement.targets if isinstance(statement, ast.Assign) else [statement.target]


def _target_names(statement: Assignment) -> set[str]:
    return {
        node.id
        for target in _targets(statement)
        for node in ast.walk(target)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def _value_for(statement: ast.Assign | ast.AnnAssign | ast.AugAssign, name: str) -> ast.expr | None:
    """What ``name = value`` or ``name, other = value, 2`` assigns to the name."""
    targets = _targets(statement)
    if isinstance(statement, ast.AugAssign) or len(targets) != 1:
        return None
    target, value = targets[0], statement.value
    if isinstance(target, ast.Name):
        return value
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        pairs = zip(target.elts, value.elts, strict=False)
        same_length = len(target.elts) == len(value.elts)
        found = [v for t, v in pairs if isinstance(t, ast.Name) and t.id == name]
        return found[0] if found and same_length else None
    return None


def is_dict_call(node: ast.AST) -> bool:
    """Whether this is ``dict(...)``."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict"


def _child(node: ast.expr, key: str) -> ast.expr | None:
    """The expression of a key in a literal dict or list."""
    if isinstance(node, ast.Call) and is_dict_call(node):
        return next((word.value for word in node.keywords if word.arg == key), None)
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        found = [v for k, v in pairs if isinstance(k, ast.Constant) and str(k.value) == key]
        return found[-1] if found else None
    if isinstance(node, ast.List | ast.Tuple) and key.isdigit() and int(key) < len(node.elts):
        starred = any(isinstance(item, ast.Starred) for item in node.elts)
        return None if starred else node.elts[int(key)]
    return None


FULL_WIDTH = str.maketrans(
    "\uff0c\u3002\uff1a\uff1b\uff08\uff09\u201c\u201d\u2018\u2019\u3010\u3011\uff1d",
    ",.:;()\"\"''[]=",
)
"""Punctuation of Chinese input methods, and what Python wants instead."""


_WINDOWS_PATH = re.compile(r"""['"][A-Za-z]:\\""")


def _half_width(char: str) -> str:
    """What Python wants in place of a character of a Chinese input method; else itself."""
    plain = char.translate(FULL_WIDTH)
    narrow = unicodedata.normalize("NFKC", plain)
    return narrow if unicodedata.east_asian_width(plain) == "F" and narrow.isascii() else plain


def _hint_for(what: str, shown: str) -> str:
    """What to do about a line that is not Python, by what Python says."""
    if "non-printable" in what or "null bytes" in what:
        return tr("delete this invisible character; it often comes from copied text.")
    found = [char for char in shown if _half_width(char) != char]
    if found and "invalid character" in what:
        right = _half_width(found[0])
        return tr("{found} is a full-width character; write {right}", found=found[0], right=right)
    if shown.lstrip().startswith(("<<<<<<<", "=======", ">>>>>>>")):
        return tr("this is the mark of a conflict of git: keep one of the two versions.")
    if "unicodeescape" in what or ("unterminated" in what and _WINDOWS_PATH.search(shown)):
        return tr("backslashes of a Windows path: write r'C:\\data' or 'C:/data'.")
    if "unterminated" in what and "string" in what:
        return tr("a quotation mark is missing at the end of this text.")
    return tr("fix this line; a missing comma or bracket is often on the line before it.")


def _not_python(error: SyntaxError | ValueError, text: str, file: str) -> UserError:
    line = error.lineno if isinstance(error, SyntaxError) else None
    what = error.msg if isinstance(error, SyntaxError) else str(error)
    lines = split_lines(text)
    shown = f"\n    {lines[line - 1].strip()}" if line and line <= len(lines) else ""
    return UserError(
        tr("this is not valid Python: {what}{shown}", what=what, shown=shown),
        hint=_hint_for(what, shown),
        where=Where(file, line),
    )
