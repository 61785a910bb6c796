"""Changed copies of a config's source text.

Edits replace expressions by their position in the syntax tree and keep the number of lines, so
whatever is computed from a setting follows it and line numbers stay those of the file. A value that
has no expression of its own is set by a statement at the end of the file.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

from xtuner.config.source import ConfigSource, SourceSpan, is_dict_call
from xtuner.config.values import MISSING, KeyPath, is_argument_name, item_of


def with_value(source: ConfigSource, path: KeyPath, code: str, current: object) -> ConfigSource:
    """A copy of the text in which a key has another value.

    Args:
        source: the text.
        path: the key, split at its dots.
        code: the new value, as Python.
        current: the value of ``path[0]`` now (None if there is none), which tells lists from dicts.
    """
    edited = _with_setting(source, path[0], code) if len(path) == 1 else None
    if len(path) > 1:
        span = source.find(path)
        text = source.segment(span.node) if span else ""
        new = _expression(text, span, path, code, current) if span else None
        if span and new:
            edited = with_expressions(source, [(span.node, new)])
    return edited or with_statement(source, path, code, current)


def with_settings(source: ConfigSource, codes: Mapping[str, str]) -> ConfigSource:
    """A copy of the text in which top-level names have other values, given as Python.

    Names that are assigned alone are all replaced in one pass over the text.
    """
    nodes = {name: source.values_of(name) for name in codes}
    edits = [(node, codes[name]) for name, found in nodes.items() for node in found]
    edits.sort(key=lambda edit: (edit[0].lineno, edit[0].col_offset))
    edited = with_expressions(source, edits) if edits else source
    for name in (name for name, found in nodes.items() if not found):
        edited = with_value(edited, (name,), codes[name], None)
    return edited


def with_statement(source: ConfigSource, path: KeyPath, code: str, current: object) -> ConfigSource:
    """A copy of the text with a statement at its end that sets the key; arguments as above."""
    target, depth = path[0], 1
    while depth < len(path):
        inner = item_of(current, path[depth])
        target += f"[{path[depth] if isinstance(current, list | tuple) else repr(path[depth])}]"
        depth += 1
        if inner is MISSING:
            break
        current = inner
    value = _nested(path[depth:], code)
    return ConfigSource(f"{source.text.rstrip()}\n{target} = {value}\n", source.file)


def with_expressions(source: ConfigSource, edits: Sequence[tuple[ast.expr, str]]) -> ConfigSource:
    """A copy of the text with other code in place of expressions, which keep their lines.

    Args:
        source: the text.
        edits: expressions of ``source.tree``, in the order of the file, and the code for each.
    """
    data = source.text.encode()
    starts = [0]
    for line in data.splitlines(keepends=True):  # bytes are split as ``ast`` counts lines
        starts.append(starts[-1] + len(line))
    for node, code in reversed(edits):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        padding = "\n" * (data[begin:end].count(b"\n") - code.count("\n"))
        data = data[:begin] + (code + padding).encode() + data[end:]
    return ConfigSource(data.decode(), source.file)


def with_imports(source: ConfigSource, statements: Sequence[str]) -> ConfigSource:
    """A copy of the text with further import statements, before its first one."""
    imports = (n for n in source.tree.body if isinstance(n, ast.Import | ast.ImportFrom))
    first = next((node.lineno for node in imports), 1)
    lines = [*source.lines[: first - 1], *statements, *source.lines[first - 1 :]]
    return ConfigSource("\n".join(lines).rstrip("\n") + "\n", source.file)


def _with_setting(source: ConfigSource, name: str, code: str) -> ConfigSource | None:
    """A copy in which every assignment to a top-level name assigns ``code``."""
    nodes = source.values_of(name)
    if nodes:
        return with_expressions(source, [(node, code) for node in nodes])
    shared = [s for s in source.assignments(name) if not isinstance(s, ast.AugAssign)]
    if not shared or shared[-1].value is None:
        return None
    whole = shared[-1].value  # one value for several names: set this one after it
    return with_expressions(source, [(whole, f"{source.segment(whole)}; {name} = {code}")])


def _expression(
    text: str, span: SourceSpan, path: KeyPath, code: str, current: object
) -> str | None:
    """What to write in place of a span's expression, on as many lines as it has at most.

    Returns:
        None where the expression is of a kind that cannot take the key.
    """
    if not span.rest:
        return code
    for key in path[1 : len(path) - len(span.rest)]:
        current = item_of(current, key)
    key, rest = span.rest[0], span.rest[1:]
    if not isinstance(current, dict) or not is_argument_name(key):
        return None
    node = span.node
    if isinstance(node, ast.Call) and is_dict_call(node) and not node.args:
        has_unpacking = any(word.arg is None for word in node.keywords)
        return None if has_unpacking else _with_keyword(text, f"{key}={_nested(rest, code)}")
    return _updated_copy(text, span.rest, code, current) if isinstance(node, ast.Name) else None


def _with_keyword(call: str, keyword: str) -> str:
    """``dict(...)`` with one more keyword in front, on the line of the first one."""
    inside = call.partition("(")[2].rpartition(")")[0]
    first = inside.lstrip()
    space = inside[: len(inside) - len(first)]
    return f"dict({space}{keyword}{', ' if first else ''}{first})"


def _updated_copy(base: str, keys: KeyPath, code: str, current: object) -> str | None:
    """``dict(base, key=...)``: a changed copy of a dict that other places may use too."""
    key, rest = keys[0], keys[1:]
    if not isinstance(current, dict) or not is_argument_name(key):
        return None
    inner = item_of(current, key)
    if not rest or inner is MISSING:
        return f"dict({base}, {key}={_nested(rest, code)})"
    deeper = _updated_copy(f'{base}["{key}"]', rest, code, inner)
    return deeper and f"dict({base}, {key}={deeper})"


def _nested(keys: KeyPath, code: str) -> str:
    """``code`` inside a new dict for each key."""
    for key in reversed(keys):
        code = f"{{{key!r}: {code}}}"
    return code
