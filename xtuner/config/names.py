"""Finding what an import in a config means by reading source files, without importing anything.

Importing torch, transformers and mmengine takes many seconds; reading the few files that define
the names of a config takes a fraction of one.
"""

from __future__ import annotations

import ast
import functools
import importlib.machinery
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

DEPTH = 12  # re-exports of re-exports


@dataclass(frozen=True)
class Found:
    """The definition of a name: the syntax node and the module it stands in."""

    node: ast.AST
    module: str


class NotThere(Exception):
    """The module or the name does not exist, for certain."""

    def __init__(self, module: str, name: str = "", package: str = "") -> None:
        super().__init__(name or module)
        self.module = module
        self.name = name
        self.package = package  # set when a whole package is not installed


@functools.lru_cache(maxsize=4096)
def find(module: str, name: str) -> Found | None:
    """The definition of ``name`` in ``module``, followed through re-exports.

    Returns:
        None when it exists or may exist but has no definition in Python (a compiled module, a
        name made at run time).

    Raises:
        NotThere: when the module or the name does not exist.
    """
    return _find(module, name, DEPTH)


def forget() -> None:
    """Look for modules anew: there are others than before."""
    for cached in (find, module_file, parsed, _search):
        cached.cache_clear()


def _find(module: str, name: str, depth: int) -> Found | None:
    file = module_file(module)
    if file is None or depth == 0:
        return None
    tree = parsed(file)
    for node in _module_level(tree.body):
        found = _defines(node, name)
        if isinstance(found, ast.ImportFrom):
            original = next(a.name for a in found.names if (a.asname or a.name) == name)
            return _imported(_absolute(module, file, found), original, depth - 1)
        if isinstance(found, ast.Assign) and isinstance(found.value, ast.Name):
            return _find(module, found.value.id, depth - 1)
        if found is not None:
            return Found(found, module)
    home = _lazy_home(tree, name)
    if home:
        return _imported(f"{module}.{home}", name, depth - 1)
    return _through_stars(module, file, tree, name, depth)


def _imported(module: str, name: str, depth: int) -> Found | None:
    """``from module import name``: an attribute of the module, or a module inside it."""
    try:
        return _find(module, name, depth)
    except NotThere:
        if module_exists(f"{module}.{name}"):
            return None
        raise


def _through_stars(
    module: str, file: Path, tree: ast.Module, name: str, depth: int
) -> Found | None:
    stars = [
        _absolute(module, file, node)
        for node in _module_level(tree.body)
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
    ]
    for star in stars:
        target = module_file(star)
        if target is None:
            return None
        if target.name == "__init__.py":  # a package of hundreds of modules: search, not parse
            inside = _search(target.parent, star, name)
            if inside:
                return _find(inside, name, depth - 1)
            continue
        try:
            return _find(star, name, depth - 1)
        except NotThere:
            continue
    if any(isinstance(n, ast.FunctionDef) and n.name == "__getattr__" for n in tree.body):
        return None
    if _made_at_run_time(tree, name):
        return None
    raise NotThere(module, name)


def _made_at_run_time(tree: ast.Module, name: str) -> bool:
    """Whether the module mentions the name in ``__all__`` or assigns globals in a loop."""
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return name in words or any(
        isinstance(node, ast.Call) and ast.unparse(node.func) in ("globals", "setattr")
        for node in ast.walk(tree)
    )


@functools.lru_cache(maxsize=1024)
def _search(folder: Path, package: str, name: str) -> str | None:
    """The module below a package that defines a class, function or variable of this name."""
    pattern = re.compile(rf"^(class|def) {re.escape(name)}\b|^{re.escape(name)}\b ?=", re.M)
    for file in sorted(folder.rglob("*.py")):
        text = file.read_text("utf-8", errors="replace")
        if name in text and pattern.search(text):
            parts = file.relative_to(folder).with_suffix("").parts
            return ".".join([package, *(part for part in parts if part != "__init__")])
    return None


def module_exists(module: str) -> bool:
    """Whether there is such a module, in Python or compiled."""
    try:
        module_file(module)
    except NotThere:
        return False
    return True


@functools.lru_cache(maxsize=4096)
def module_file(module: str) -> Path | None:
    """The source file of a module; None when it is compiled or built in.

    Raises:
        NotThere: when there is no such module.
    """
    top, *rest = module.split(".")
    try:
        spec: importlib.machinery.ModuleSpec | None = importlib.util.find_spec(top)
    except ValueError:  # no __spec__: made at run time
        return None
    if spec is None:
        raise NotThere(module, package=top)
    for depth, part in enumerate(rest):
        if spec.submodule_search_locations is None:
            return _aliased(module, ".".join([top, *rest[:depth]]), part)
        inner = importlib.machinery.PathFinder.find_spec(
            part, [str(place) for place in spec.submodule_search_locations]
        )
        if inner is None:
            return _aliased(module, ".".join([top, *rest[:depth]]), part)
        spec = inner
    origin = Path(spec.origin) if spec.origin else None
    return origin if origin and origin.suffix == ".py" else None


def _aliased(module: str, parent: str, part: str) -> Path | None:
    """A module that its parent makes under another name (``torch.optim`` has none, ``os.path``)."""
    parent_file = module_file(parent)
    if parent_file is None:
        return None
    for node in _module_level(parsed(parent_file).body):
        if _defines(node, part):
            return None
    raise NotThere(module)


@functools.lru_cache(maxsize=1024)
def parsed(file: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(file.read_text("utf-8", errors="replace"))


def _module_level(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.For):
            for block in ("body", "orelse", "finalbody"):
                yield from _module_level(getattr(node, block, []))
            for handler in getattr(node, "handlers", []):
                yield from _module_level(handler.body)


def _defines(node: ast.stmt, name: str) -> ast.stmt | None:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        overload = any("overload" in ast.unparse(mark) for mark in node.decorator_list)
        return node if node.name == name and not overload else None
    if isinstance(node, ast.ImportFrom):
        return node if any((a.asname or a.name) == name for a in node.names) else None
    if isinstance(node, ast.Import):
        names = {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        return node if name in names else None
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        stored = {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        return node if name in stored else None
    return None


def _absolute(module: str, file: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, *([node.module] if node.module else [])])


def _lazy_home(tree: ast.Module, name: str) -> str | None:
    """The submodule that a table of lazy exports, ``{"submodule": ("Name", ...)}``, gives."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Dict):
            continue
        for key, value in zip(node.keys, node.values, strict=True):
            if (
                isinstance(key, ast.Constant)
                and isinstance(key.value, str)
                and isinstance(value, ast.List | ast.Tuple | ast.Set)
                and any(isinstance(e, ast.Constant) and e.value == name for e in value.elts)
            ):
                return key.value
    return None
