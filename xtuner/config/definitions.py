"""Functions and classes that a config defines itself, or takes from plain modules beside it.

They stay lazy while the config is loaded, as everything that it imports: a module is made of a
config's definitions when one of them is first used. They run as ordinary Python there, with their
imports loaded and the values of the config as globals.

``from .my_map import my_map_fn``, inside ``with read_base():`` or not, means the same as
``from my_map import my_map_fn``: the module ``my_map.py`` in the folder of the config.
"""

from __future__ import annotations

import ast
import functools
import importlib.abc
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeGuard

from mmengine.config.lazy import LazyAttr, LazyObject

from xtuner.config.local_modules import loader_of, register_loader
from xtuner.config.source import ConfigSource, split_lines
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

PREFIX = "xtuner_config_"
"""The module of what a config defines is called this and the name of the file."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass
class _Definitions(importlib.abc.InspectLoader):
    """Loads the definitions of a config file as a module; ``values`` are its other names."""

    text: str
    file: str
    values: dict[str, Any]

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def shown_file(self) -> str:
        """The file in tracebacks; another name where the text is not what the file has."""
        path = Path(self.file)
        same = path.is_file() and path.read_text("utf-8") == self.text
        return self.file if same else f"{self.file} (changed)"

    def get_source(self, fullname: str) -> str:
        return self.text

    def is_package(self, fullname: str) -> bool:
        return False

    def get_code(self, fullname: str) -> CodeType:
        future = [n for n in self.tree.body if getattr(n, "module", "") == "__future__"]
        tree = ast.Module([*future, *_definitions(self.tree)], [])
        return compile(tree, self.shown_file, "exec")

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = self.shown_file
        definitions = _definitions(self.tree)
        used = {name for node in definitions for name in _names_in(node)}
        for name in used - {node.name for node in definitions}:
            if name in self.values:
                value = dict.__getitem__(self.values, name)
                is_lazy = isinstance(value, LazyObject | LazyAttr)
                setattr(module, name, value.build() if is_lazy else value)
        super().exec_module(module)


def forget_definitions(file: str) -> None:
    """Let the definitions of a file be made again where they are used next."""
    sys.modules.pop(_module_name(file), None)


def with_lazy_definitions(text: str, tree: ast.Module, file: str) -> str:
    """The text for mmengine: classes, and functions of modules beside it, are imported names.

    Line numbers stay. What is called while the config is loaded is left as it is.
    """
    lines = split_lines(text)
    before = list(lines)
    called = _called(tree)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name not in called:
            start = min([node.lineno, *(mark.lineno for mark in node.decorator_list)]) - 1
            end = node.end_lineno or node.lineno
            lines[start:end] = [""] * (end - start)
            lines[start] = f"from {_module_name(file)} import {node.name}"
        elif isinstance(node, ast.With) and (node.end_lineno or 0) > node.lineno:
            _move_out(node, lines, Path(file).resolve().parent, called)
    for each in ast.walk(tree):
        if isinstance(each, ast.Import) and len(each.names) > 1 and each.end_lineno == each.lineno:
            _put_one_by_one(each, lines)
    return text if lines == before else "\n".join(lines)


def _put_one_by_one(node: ast.Import, lines: list[str]) -> None:
    """``import a, b`` as ``import a; import b``: mmengine takes one module in each."""
    line = lines[node.lineno - 1].encode()
    statements = "; ".join(f"import {ast.unparse(name)}" for name in node.names).encode()
    whole = line[: node.col_offset] + statements + line[node.end_col_offset :]
    lines[node.lineno - 1] = whole.decode()


def has_definitions(tree: ast.Module) -> bool:
    """Whether a config defines functions or classes."""
    return bool(_definitions(tree))


def with_lazy_values(values: dict[str, Any], source: ConfigSource, path: str) -> set[str]:
    """Put imported names in place of the functions that a config and its base files define.

    Args:
        values: of the config, as mmengine loaded it; they are changed.
        source: of the config.
        path: the file that mmengine read: a copy of the config or itself.

    Returns:
        The keys of the functions.
    """

    text, file = source.text, source.file

    def lazy(value: object) -> object:
        if _is_defined_by_a_config(value):
            origin = value.__code__.co_filename
            if origin == path:
                name = _register(text, file, values)
            else:
                name = _register(Path(origin).read_text("utf-8"), origin, value.__globals__)
            return LazyObject(name, value.__name__, location=origin.replace(path, file))
        if isinstance(value, LazyObject) and str(value._module).startswith("."):
            return _absolute(value, file)
        if isinstance(value, dict):
            for key in dict.keys(value):
                dict.__setitem__(value, key, lazy(dict.__getitem__(value, key)))
        elif isinstance(value, list | tuple) and type(value) in (list, tuple):
            return type(value)(map(lazy, value))
        return value

    if has_definitions(source.tree):
        _register(text, file, values)
    functions = {key for key, value in dict.items(values) if _is_defined_by_a_config(value)}
    lazy(values)
    return functions


def definitions_text(module: str) -> str | None:
    """The source of what a config defines and its imports; None of any other module."""
    loader = loader_of(module)
    if not isinstance(loader, _Definitions):
        return None
    definitions = _definitions(loader.tree)
    used = {name for node in definitions for name in _names_in(node)}
    imports = [
        node
        for node in loader.tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and used & {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    ]
    parts = ["\n".join(map(ast.unparse, imports))]
    for node in definitions:
        marks = "".join(f"@{ast.unparse(mark)}\n" for mark in node.decorator_list)
        parts.append(marks + (ast.get_source_segment(loader.text, node) or ast.unparse(node)))
    return "\n\n\n".join(part for part in parts if part)


def _module_name(file: str) -> str:
    return PREFIX + re.sub(r"\W", "_", Path(file).stem)


def _definitions(tree: ast.Module) -> list[Definition]:
    return [node for node in tree.body if isinstance(node, Definition)]


def _names_in(node: ast.AST) -> set[str]:
    """The names that code reads."""
    names = (n for n in ast.walk(node) if isinstance(n, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, ast.Load)}


def _is_defined_by_a_config(value: object) -> TypeGuard[FunctionType]:
    """Whether this is a function (no lambda) that mmengine made of a config's text."""
    return (
        isinstance(value, FunctionType)
        and value.__name__.isidentifier()
        and value.__module__ in (None, "builtins")
    )


def _register(text: str, file: str, values: dict[str, Any]) -> str:
    name = _module_name(file)
    before = loader_of(name)
    if isinstance(before, _Definitions) and before.file != file:  # another file of this name
        sys.modules.pop(name, None)
    register_loader(name, _Definitions(text, file, values), Path(file))
    return name


def _called(tree: ast.Module) -> set[str]:
    """The names that are called while the file is run, by functions called then too."""
    definitions = {node.name: node for node in tree.body if isinstance(node, Definition)}
    waiting: list[ast.AST] = [node for node in tree.body if not isinstance(node, Definition)]
    called: set[str] = set()
    while waiting:
        calls = (node for node in ast.walk(waiting.pop()) if isinstance(node, ast.Call))
        found = {call.func.id for call in calls if isinstance(call.func, ast.Name)} - called
        called |= found
        waiting += [definitions[name] for name in found if name in definitions]
    return called


def _move_out(node: ast.With, lines: list[str], folder: Path, called: set[str]) -> None:
    """Take imports of functions and classes of plain modules out of a ``with read_base():``."""
    kept: list[ast.stmt] = []
    moved: list[tuple[int, str]] = []
    for inner in node.body:
        if not isinstance(inner, ast.ImportFrom) or inner.level != 1 or not inner.module:
            kept.append(inner)
            continue
        defined = _defined_in(folder / f"{inner.module.replace('.', '/')}.py")
        out = [a for a in inner.names if a.name in defined and (a.asname or a.name) not in called]
        rest = [alias for alias in inner.names if alias not in out]
        if out:
            text = ast.unparse(ast.ImportFrom(inner.module, out, 0))
            moved.append((max(inner.lineno, node.lineno + 1), text))
        if rest:
            kept.append(ast.ImportFrom(inner.module, rest, inner.level))
    if not moved:
        return
    start, end = node.lineno - 1, node.end_lineno or node.lineno
    lines[start:end] = [""] * (end - start)
    if kept:
        head = ast.unparse(node).partition(":")[0]
        lines[start] = f"{head}: {'; '.join(map(ast.unparse, kept))}"
    for line, text in moved:
        lines[line - 1] += f"; {text}" if lines[line - 1] else text


def _defined_in(file: Path) -> set[str]:
    """The functions and classes of a plain module; none of a file that is a config with a base."""
    if not file.is_file():
        return set()
    text = file.read_text("utf-8")
    return {node.name for node in _definitions(ast.parse(text)) if "read_base" not in text}


def _absolute(value: LazyObject, file: str) -> LazyObject:
    """``from .module import name``, by the name that the module has beside the config.

    Raises:
        UserError: when it is above the config's folder.
    """
    module = str(value._module).removeprefix(".")
    if module.startswith("."):
        raise UserError(
            tr("'{module}' is above the folder of the config", module=value._module),
            hint=tr("put the module beside the config: 'from my_map import my_map_fn'."),
            where=Where(file),
        )
    return LazyObject(module, value._imported, location=value.location)
