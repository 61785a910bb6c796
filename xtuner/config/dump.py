"""Writing a config as a Python file that trains the same run again.

The file is the config's own text with what was changed since put into it, so comments stay and
an override of ``lr`` still reaches. Where that gives another config, every value is spelled out.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import inspect
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject

from xtuner.config.load import load_source, raw_dict
from xtuner.config.names import NotThere, find
from xtuner.config.source import Source
from xtuner.utils.errors import UserError

WIDTH = 96
_REMOVED = object()


def dump_config(cfg: Config) -> str:
    """The text of a config file; loading it gives an equal config.

    Args:
        cfg: a config of ``load_config``, changed since or not.
    """
    return _edited_text(cfg) or spelled_out(cfg)


def spelled_out(cfg: Config) -> str:
    """The config with every value in its place: imports, then one assignment per key."""
    values = own_values(cfg)
    writer = Writer(taken=set(values))
    local = _local_functions(cfg, values)
    body = ""
    for key, value in values.items():
        if key not in local and not _is_local_function(value):
            text = f"{key} = {writer.lines(value)}\n"
            body += f"\n{text}" if text.count("\n") > 1 else text
    parts = ["\n".join(writer.imports()), *local.values(), body.strip()]
    return "\n\n".join(part for part in parts if part) + "\n"


def own_values(cfg: Config) -> dict[str, Any]:
    """The keys that the config defines itself, without what it imports; lazy objects stay lazy."""
    imported: set[str] = getattr(cfg, "_imported_names", set())
    return {
        key: value
        for key, value in dict.items(raw_dict(cfg))
        if key not in imported and not isinstance(value, ModuleType)
    }


def same_config(one: Config, other: Config) -> bool:
    """Whether two configs hold the same values, imported names compared by what they name."""
    return _canonical(own_values(one)) == _canonical(own_values(other))


def _canonical(value: Any) -> str:
    if _is_local_function(value):
        return f"def {value.__name__}"
    if isinstance(value, dict):
        pairs = sorted((repr(key), _canonical(item)) for key, item in dict.items(value))
        return "{" + ", ".join(f"{key}: {item}" for key, item in pairs) + "}"
    if isinstance(value, list | tuple):
        return type(value).__name__ + "(" + ", ".join(map(_canonical, value)) + ")"
    named = dotted_name(value)
    return ".".join(_at_home(named)) if named else repr(value)


def _at_home(named: tuple[str, ...]) -> tuple[str, ...]:
    """A name by the module that defines it, whichever module it was imported from."""
    module, name, *rest = named
    with contextlib.suppress(NotThere):
        found = find(module, name) if name else None
        if found and isinstance(found.node, ast.ClassDef | ast.FunctionDef):
            return (found.module, found.node.name, *rest)
    return named


class Writer:
    """Turns values into Python and collects the imports that they need.

    Args:
        taken: names that imports must not use.
        known: names that are already imported, and what they stand for.
    """

    def __init__(self, taken: set[str], known: dict[tuple[str, str], str] | None = None) -> None:
        self.taken = taken
        self.known = dict(known or {})
        self.new: dict[tuple[str, str], str] = {}

    def imports(self) -> list[str]:
        """The import statements for what ``line`` and ``lines`` wrote, sorted."""
        whole = [f"import {module}" for module, name in sorted(self.new) if not name]
        modules: dict[str, list[str]] = {}
        for (module, name), alias in sorted(self.new.items()):
            if name:
                renamed = f"{name} as {alias}" if alias != name else name
                modules.setdefault(module, []).append(renamed)
        return whole + [_import_from(module, names) for module, names in modules.items()]

    def line(self, value: Any) -> str:
        """A value on one line."""
        if isinstance(value, dict):
            pairs = list(dict.items(value))
            if all(isinstance(key, str) and key.isidentifier() for key, _ in pairs):
                return "dict(" + ", ".join(f"{k}={self.line(v)}" for k, v in pairs) + ")"
            return "{" + ", ".join(f"{k!r}: {self.line(v)}" for k, v in pairs) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(self.line, value)) + "]"
        if isinstance(value, tuple):
            comma = "," if len(value) == 1 else ""
            return "(" + ", ".join(map(self.line, value)) + comma + ")"
        named = dotted_name(value)
        if named:
            return self._imported(*named)
        if _is_local_function(value):
            return str(value.__name__)
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        return repr(value)

    def lines(self, value: Any, indent: int = 0) -> str:
        """A value on one line where it fits, else an item a line."""
        line = self.line(value)
        if len(line) + indent <= WIDTH or not isinstance(value, dict | list | tuple) or not value:
            return line
        inner = " " * (indent + 4)
        if isinstance(value, dict):
            pairs = list(dict.items(value))
            words = line.startswith("dict(")
            items = [
                (f"{k}=" if words else f"{k!r}: ") + self.lines(v, indent + 4) for k, v in pairs
            ]
            begin, end = ("dict(", ")") if words else ("{", "}")
        else:
            items = [self.lines(item, indent + 4) for item in value]
            begin, end = ("[", "]") if isinstance(value, list) else ("(", ")")
        return f"{begin}\n" + "".join(f"{inner}{item},\n" for item in items) + " " * indent + end

    def _imported(self, module: str, name: str, rest: str = "") -> str:
        key = (module, name)
        if key not in self.known and key not in self.new:
            alias = name or module
            used = {*self.taken, *self.known.values(), *self.new.values()}
            while name and alias in used:
                alias += "_"
            self.new[key] = alias
        alias = self.known.get(key) or self.new[key]
        return f"{alias}.{rest}" if rest else alias


def _import_from(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= WIDTH:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"


def dotted_name(value: Any) -> tuple[str, ...] | None:
    """Module, name in it, and what follows: how to import what a value stands for, or None."""
    if isinstance(value, LazyAttr):
        chain = [value.name]
        while isinstance(value.source, LazyAttr):
            value = value.source
            chain.insert(0, value.name)
        root = dotted_name(value.source)
        return (root[0], root[1], ".".join(chain)) if root else None
    if isinstance(value, LazyObject):
        module = value._module if isinstance(value._module, str) else value._module[0]
        return (module, value._imported or "")
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return ("torch", "", str(value).partition(".")[2])
    if isinstance(value, str | bytes | int | float | complex | None.__class__):
        return None
    name = getattr(value, "__qualname__", "")
    owner = getattr(value, "__self__", None)
    if inspect.ismethod(value) and inspect.isclass(owner):
        return (owner.__module__, *_first_rest(f"{owner.__qualname__}.{value.__name__}"))
    if name and "<" not in name and not _is_local_function(value):
        return (value.__module__, *_first_rest(name))
    return None


def _first_rest(qualname: str) -> tuple[str, ...]:
    first, _, rest = qualname.partition(".")
    return (first, rest) if rest else (first,)


def _is_local_function(value: Any) -> bool:
    """Whether the config file itself defines this function or class."""
    if not (inspect.isfunction(value) or inspect.isclass(value)):
        return False
    return value.__module__ in (None, "builtins") and not hasattr(builtins, value.__name__)


def _local_functions(cfg: Config, values: dict[str, Any]) -> dict[str, str]:
    """The source of functions and classes that the config itself defines, and their imports."""
    if not any(_is_local_function(value) for value in values.values()):
        return {}
    tree = ast.parse(cfg._text)
    defined = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    used = {n.id for f in defined for n in ast.walk(f) if isinstance(n, ast.Name)}
    imports = [
        ast.unparse(node)
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and used & {alias.asname or alias.name for alias in node.names}
    ]
    sources = {node.name: ast.get_source_segment(cfg._text, node) or "" for node in defined}
    return {"": "\n".join(imports), **sources}


def _edited_text(cfg: Config) -> str | None:
    """The config's own text with the changes put in; None where that gives another config."""
    if not str(cfg.filename or "x.py").endswith(".py") or not cfg._text:
        return None
    try:
        source = Source(cfg._text, cfg.filename or "config.py")
        before = load_source(source)
        edited = _apply(source, before, cfg)
        return edited.text if same_config(load_source(edited), cfg) else None
    except (UserError, ValueError):
        return None


def _apply(source: Source, before: Config, after: Config) -> Source:
    values = own_values(after)
    writer = Writer(taken={*values, *source.imported()}, known=_imports_of(source))
    old = own_values(before)
    for path, value in changes(old, values):
        if value is _REMOVED:
            inner = "".join(f"[{int(k) if k.isdigit() else repr(k)}]" for k in path[1:])
            source = Source(f"{source.text.rstrip()}\ndel {path[0]}{inner}\n", source.file)
        else:
            source = source.with_value(path, writer.line(value), old.get(path[0]))
    imports = writer.imports()
    if not imports:
        return source
    first = next(
        (n.lineno for n in source.tree.body if isinstance(n, ast.Import | ast.ImportFrom)), 1
    )
    lines = source.text.splitlines()
    return Source(
        "\n".join([*lines[: first - 1], *imports, *lines[first - 1 :]]) + "\n", source.file
    )


def changes(
    old: Any, new: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The keys whose values differ, with the new value (``_REMOVED`` where it is gone)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in dict.items(new):
            if key in old:
                yield from changes(dict.__getitem__(old, key), value, (*path, str(key)))
            else:
                yield (*path, str(key)), value
        yield from (((*path, str(key)), _REMOVED) for key in old.keys() - new.keys())
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from changes(one, other, (*path, str(number)))
    elif _canonical(old) != _canonical(new):
        yield path, new


def _imports_of(source: Source) -> dict[tuple[str, str], str]:
    """What the text imports at its top level: (module, name) -> the name it has there."""
    known = {}
    for node in source.tree.body:
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                known[(node.module or "", alias.name)] = alias.asname or alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                known[(alias.name, "")] = alias.asname or alias.name
    return known
