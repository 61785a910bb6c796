"""The text of a config: where in it a key has its value, and new values put there.

Edits replace expressions by their position in the syntax tree and never change the number of
lines, so whatever is computed from a setting follows it and line numbers stay those of the file.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

Path = Sequence[str]
Assignment = ast.Assign | ast.AnnAssign | ast.AugAssign
_MISSING = object()


@dataclass(frozen=True)
class SourceSpan:
    """Where a key was found: an expression, and the keys that lie inside what it evaluates to."""

    node: ast.expr
    rest: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One step from a key to its value: ``key = <node>`` at a line and column (from 1)."""

    line: int
    column: int
    key: str
    node: ast.expr


class Source:
    """The text of a config in Python.

    Args:
        text: the text.
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

    def find(self, path: Path) -> SourceSpan | None:
        """Where the key has its value: follow literal dicts and lists from the last assignment.

        Returns:
            None when the file itself does not assign the first name of the path.
        """
        values = self._values(path[0])
        if not values:
            return None
        node = values[-1]
        for depth, key in enumerate(path[1:], start=1):
            child = _child(node, key)
            if child is None:
                return SourceSpan(node, tuple(path[depth:]))
            node = child
        return SourceSpan(node)

    def trace(self, path: Path) -> list[Step]:
        """From the key to where its value is written: each step follows a name to its assignment.

        Returns:
            The steps, the key itself first; empty when the file does not assign it.
        """
        steps: list[Step] = []
        while site := self.find(path):
            line, column = site.node.lineno, site.node.col_offset + 1
            key = ".".join(path[: len(path) - len(site.rest)])
            steps.append(Step(line, column, key, site.node))
            node: ast.expr = site.node
            if isinstance(node, ast.Call) and is_dict_call(node) and node.args and site.rest:
                node = node.args[0]
            following = isinstance(node, ast.Name) and self.assignments(node.id)
            if not isinstance(node, ast.Name) or not following or len(steps) > 20:
                break
            path = (node.id, *site.rest)
        return steps

    def place(self, path: Path) -> tuple[int, int] | None:
        """Line and column (both from 1) of where a key's value is written, or of what is around.

        Of a value that is computed it is the first setting that it is computed from.
        """
        steps = self.trace(path)
        if steps:
            last = steps[-1]
            inner = ast.walk(last.node) if isinstance(last.node, ast.BinOp) else ()
            names = [node.id for node in inner if isinstance(node, ast.Name)]
            settings = [name for name in names if self.assignments(name)]
            if settings and settings[0] != path[0]:
                return self.place([settings[0]])
            return last.line, last.column
        return self._statement_place(path)

    def key_place(self, path: Path) -> tuple[int, int] | None:
        """Line and column of the key itself: ``key=...`` in a dict or call."""
        for step in self.trace(path):
            name = step.key.rpartition(".")[2]
            if name == path[-1]:
                line = self.text.splitlines()[step.line - 1].encode()[: step.column - 1]
                before = len(name) + 1 if line.endswith(f"{name}=".encode()) else 0
                return step.line, step.column - before
        return self.place(path)

    def _statement_place(self, path: Path) -> tuple[int, int] | None:
        """Of the assignment or import of the key's first name."""
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

    def with_value(self, path: Path, code: str, current: Any) -> Source:
        """A copy in which the key has another value.

        Args:
            path: the key, split at its dots.
            code: the new value, as Python.
            current: the value of ``path[0]`` now (None if there is none), to see lists and gaps.
        """
        edited = self._with_name(path[0], code) if len(path) == 1 else None
        if len(path) > 1:
            site = self.find(path)
            new = _expression(self.segment(site.node), site, path, code, current) if site else None
            if site and new:
                edited = self._replaced([(site.node, new)])
        return edited or self.appended(path, code, current)

    def appended(self, path: Path, code: str, current: Any) -> Source:
        """A copy with a statement at its end that sets the key."""
        target, depth = path[0], 1
        while depth < len(path):
            inner = _item(current, path[depth])
            target += f"[{_subscript(path[depth], current)}]"
            depth += 1
            if inner is _MISSING:
                break
            current = inner
        value = _nested(path[depth:], code)
        return Source(f"{self.text.rstrip()}\n{target} = {value}\n", self.file)

    def segment(self, node: ast.AST) -> str:
        """The text of an expression."""
        return ast.get_source_segment(self.text, node) or ast.unparse(node)

    def _values(self, name: str) -> list[ast.expr]:
        """The expressions that are assigned to a name alone."""
        values = [_value_for(statement, name) for statement in self.assignments(name)]
        return [value for value in values if value is not None]

    def _with_name(self, name: str, code: str) -> Source | None:
        nodes = self._values(name)
        if nodes:
            return self._replaced([(node, code) for node in nodes])
        shared = [s for s in self.assignments(name) if not isinstance(s, ast.AugAssign)]
        if not shared or shared[-1].value is None:  # one value for several names: set it after
            return None
        whole = shared[-1].value
        return self._replaced([(whole, f"{self.segment(whole)}; {name} = {code}")])

    def _replaced(self, edits: list[tuple[ast.expr, str]]) -> Source:
        """A copy with new text for expressions; the new text is one line, newlines are kept."""
        data = self.text.encode()
        starts = [0]
        for line in data.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        for node, code in reversed(edits):
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
            padding = "\n" * (data[begin:end].count(b"\n") - code.count("\n"))
            data = data[:begin] + (code + padding).encode() + data[end:]
        return Source(data.decode(), self.file)


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


def _expression(text: str, site: SourceSpan, path: Path, code: str, current: Any) -> str | None:
    """What to write in place of a site's expression, on as many lines as it had at most."""
    if not site.rest:
        return code
    for key in path[1 : len(path) - len(site.rest)]:
        current = _item(current, key)
    key, rest = site.rest[0], site.rest[1:]
    if not isinstance(current, dict) or not key.isidentifier():
        return None
    node = site.node
    if isinstance(node, ast.Call) and is_dict_call(node) and not node.args:
        spread = any(word.arg is None for word in node.keywords)
        return None if spread else _with_keyword(text, f"{key}={_nested(rest, code)}")
    return _overlay(text, site.rest, code, current) if isinstance(node, ast.Name) else None


def _with_keyword(call: str, word: str) -> str:
    """``dict(...)`` with one more keyword in front, on the line of the first one."""
    inside = call.partition("(")[2].rpartition(")")[0]
    first = inside.lstrip()
    space = inside[: len(inside) - len(first)]
    return f"dict({space}{word}{', ' if first else ''}{first})"


def _overlay(base: str, keys: Path, code: str, current: Any) -> str | None:
    """``dict(base, key=...)``: a changed copy of a dict that other places may share."""
    key, rest = keys[0], keys[1:]
    if not isinstance(current, dict) or not key.isidentifier():
        return None
    inner = _item(current, key)
    if not rest or inner is _MISSING:
        return f"dict({base}, {key}={_nested(rest, code)})"
    deeper = _overlay(f'{base}["{key}"]', rest, code, inner)
    return deeper and f"dict({base}, {key}={deeper})"


def _nested(keys: Path, code: str) -> str:
    """``code`` inside a new dict for each key."""
    for key in reversed(keys):
        code = f"{{{key!r}: {code}}}"
    return code


def _item(value: Any, key: str) -> Any:
    """A direct item of a dict or list, lazy objects left alone."""
    if isinstance(value, dict):
        return dict.get(value, key, _MISSING)
    if isinstance(value, list | tuple) and key.isdigit() and int(key) < len(value):
        return value[int(key)]
    return _MISSING


def _subscript(key: str, holder: Any) -> str:
    return key if isinstance(holder, list | tuple) else repr(key)


def value_at(value: Any, path: Path) -> Any:
    """The value at a path, lazy objects left alone.

    Raises:
        KeyError: when there is none.
    """
    for key in path:
        value = _item(value, key)
        if value is _MISSING:
            raise KeyError(key)
    return value


def _not_python(error: SyntaxError | ValueError, text: str, file: str) -> UserError:
    line = error.lineno if isinstance(error, SyntaxError) else None
    what = error.msg if isinstance(error, SyntaxError) else str(error)
    lines = text.splitlines()
    shown = f"\n    {lines[line - 1].strip()}" if line and line <= len(lines) else ""
    return UserError(
        tr("this is not valid Python: {what}{shown}", what=what, shown=shown),
        hint=tr("mend that line; a missing comma or bracket is often in the line before it."),
        where=Where(file, line),
    )
