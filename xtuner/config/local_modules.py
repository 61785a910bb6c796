"""Python modules beside a config: a config may import them, and a run keeps copies of them.

``from my_map import my_map_fn`` in a config means ``my_map.py`` in its folder, unless an installed
package has that name.
"""

from __future__ import annotations

import ast
import functools
import importlib.abc
import importlib.util
import re
import site
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path, PurePath
from types import ModuleType

from xtuner.config import names
from xtuner.config.source import split_lines
from xtuner.utils.files import write_text

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules beside configs, and those that have a loader of their own; no others."""

    def __init__(self) -> None:
        self.folders: dict[str, Path] = {}
        self.loaders: dict[str, tuple[importlib.abc.InspectLoader, Path]] = {}

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname in self.loaders:
            loader, file = self.loaders[fullname]
            origin = str(file) if file.is_file() else None
            return importlib.util.spec_from_loader(fullname, loader, origin=origin)
        folder = self.folders.get(fullname)
        return PathFinder.find_spec(fullname, [str(folder)]) if folder else None


_finder = _Finder()


def make_importable(tree: ast.Module, file: str) -> None:
    """Let imports find the modules beside a config; arguments as for ``local_files``.

    A module of the same name from another folder is imported anew.
    """
    folder = Path(file).resolve().parent
    places = [place for place in local_files(tree, file).values() if ".." not in place.parts]
    for name in {place.with_suffix("").parts[0] for place in places}:
        _finder.folders[name] = folder
        _forget(name, unless=folder)
    if places:
        _install()
        importlib.invalidate_caches()
        names.forget()


def register_loader(name: str, loader: importlib.abc.InspectLoader, file: Path) -> None:
    """Let a loader make the module of this name; the file has its source, if it exists."""
    _install()
    _finder.loaders[name] = (loader, file)


def loader_of(name: str) -> importlib.abc.InspectLoader | None:
    """The loader that was registered for a module; None where none was."""
    return _finder.loaders.get(name, (None, None))[0]


def _install() -> None:
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def local_files(tree: ast.Module, file: str) -> dict[Path, PurePath]:
    """The Python files that a config imports from its folder or by a relative path, those that a
    text names (``"my_map.my_map_fn"``), and what they import in turn.

    Args:
        tree: the syntax tree of the config.
        file: the config's file.

    Returns:
        Each file, with its path relative to the config's folder.
    """
    config = Path(file).resolve()
    found: dict[Path, PurePath] = {}
    waiting: list[tuple[ast.AST, Path]] = [(tree, config.parent)]
    while waiting:
        importing, here = waiting.pop()
        for imported in _imported_files(importing, here, config.parent):
            if imported not in found and imported != config:
                found[imported] = _relative(imported, config.parent)
                waiting.append((ast.parse(imported.read_text("utf-8")), imported.parent))
    return found


def write_local_files(tree: ast.Module, file: str, text: str, folder: Path) -> str:
    """Copy the modules that a config imports beside its own copy.

    Args:
        tree: the syntax tree of the config.
        file: the config's file.
        text: of its copy.
        folder: where the copy goes.

    Returns:
        The text of the copy: imports from above the config's folder name the copies.
    """
    files = local_files(tree, file)
    places = {file: _place(place) for file, place in files.items()}
    for local, place in places.items():
        target = folder.resolve() / place
        if target != local:
            target.parent.mkdir(parents=True, exist_ok=True)
            copied = _with_places(local.read_text("utf-8"), local.parent, place, places)
            write_text(target, copied)
    return _with_places(text, Path(file).resolve().parent, PurePath("config.py"), places)


def _forget(name: str, unless: Path) -> None:
    """Drop an imported module that was found in another folder."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if file and unless not in Path(file).resolve().parents:
        for loaded in [key for key in sys.modules if f"{key}.".startswith(f"{name}.")]:
            del sys.modules[loaded]


def _imported_files(tree: ast.AST, here: Path, root: Path) -> Iterator[Path]:
    """The local files that a file's imports mean.

    Args:
        tree: of the file.
        here: its folder, from which relative imports start.
        root: the config's folder, from which other imports start.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files_of(root, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = [here, *here.parents][max(0, node.level - 1)] if node.level else root
            yield from _files_of(base, node.module or "", bool(node.level))
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}" if node.module else alias.name
                yield from _files_of(base, dotted, bool(node.level))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from _files_of_text(root, node.value)


def _files_of_text(root: Path, text: str) -> Iterator[Path]:
    """The files of ``"my_map.my_map_fn"``, where the module is a local one that has the name."""
    if not _DOTTED.fullmatch(text):
        return
    module, _, name = text.rpartition(".")
    files = list(_files_of(root, module))
    if files and name in _defined(ast.parse(files[-1].read_text("utf-8"))):
        yield from files


def _defined(tree: ast.Module) -> set[str]:
    """The names of a module's functions and classes, and those that it imports."""
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return defined | {alias.asname or alias.name for node in imports for alias in node.names}


def _files_of(base: Path, module: str, relative: bool = False) -> Iterator[Path]:
    """The file of a module and those of the packages around it, where it is a local one."""
    *packages, last = module.split(".")
    if not relative and _is_installed((packages or [last])[0]):
        return
    folder = base.joinpath(*packages)
    choices = (folder / f"{last}.py", folder / last / "__init__.py")
    file = next((choice for choice in choices if last.isidentifier() and choice.is_file()), None)
    if file is None:
        return
    for depth in range(1, len(packages) + 1):
        package = base.joinpath(*packages[:depth]) / "__init__.py"
        if package.is_file():
            yield package
    yield file


@functools.lru_cache(maxsize=256)
def _is_installed(name: str) -> bool:
    """Whether Python or an installed package has a module of this name: it goes first."""
    if name in sys.stdlib_module_names or name == "xtuner":
        return True
    paths = {sysconfig.get_paths()[key] for key in ("purelib", "platlib")}
    spec = PathFinder.find_spec(name, [*paths, site.getusersitepackages()])
    return spec is not None and spec.origin is not None


def _relative(file: Path, root: Path) -> PurePath:
    """The path of a file seen from the config's folder, with ``..`` where it is above it."""
    common = next(parent for parent in [root, *root.parents] if parent in file.parents)
    up = len(root.relative_to(common).parts)
    return PurePath(*[".."] * up, file.relative_to(common))


def _place(place: PurePath) -> PurePath:
    """Where a copy goes, relative to the copy of the config: never above it."""
    above = ".." in place.parts
    return PurePath("_".join(p for p in place.parts if p != "..")) if above else place


def _with_places(text: str, here: Path, place: PurePath, places: Mapping[Path, PurePath]) -> str:
    """The text of a copied file, in which relative imports name the copies."""
    lines = split_lines(text)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom) or not node.level or not node.module:
            continue
        base = [here, *here.parents][node.level - 1]
        file = next(iter(_files_of(base, node.module, relative=True)), None)
        if file is not None and file in places and ".." in _relative(file, here).parts:
            dots = "." * len(place.parts)
            module = f"{dots}{'.'.join(places[file].with_suffix('').parts)}"
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = re.sub(r"from\s+\.+\s*[\w.]+", f"from {module}", line, count=1)
    return "\n".join(lines)
