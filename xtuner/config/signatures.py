"""What the callables named in a config take, read from their source without importing them."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from xtuner.config.names import Found, NotThere, find, module_exists, module_file
from xtuner.config.values import dotted_name, is_imported

INSTANCE = ("__init__", "__new__")


@dataclass(frozen=True)
class Parameters:
    """The keyword parameters of a callable."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    any_keyword: bool = False

    def takes(self, name: str) -> bool:
        return self.any_keyword or name in self.required or name in self.optional

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)


def parameters_of(kind: object) -> Parameters | None:
    """The parameters of what ``type=`` names; None when they cannot be known.

    Args:
        kind: a lazy object of mmengine, a callable, or a registered name.

    Raises nothing: a name that does not exist has no known parameters (see ``missing``).
    """
    if is_imported(kind):
        named = dotted_name(kind)
        if named is None:
            return None
        try:
            return _of_name(*named)
        except NotThere:
            return None
    return _of_callable(kind) if callable(kind) else None


def missing(kind: object) -> NotThere | None:
    """Why an imported name does not exist, or None when it does or that cannot be told."""
    named = dotted_name(kind)
    if named is None:
        return None
    module, name, rest = (*named, "")[:3]
    try:
        if not name:
            return _missing_in_module(module, rest)
        found = find(module, name)
        if found and rest and isinstance(found.node, ast.ClassDef):
            _member(found, rest.partition(".")[0])
    except NotThere as error:
        return error
    return None


def _missing_in_module(module: str, rest: str) -> NotThere | None:
    module_file(module)
    first = rest.partition(".")[0]
    return _missing_in_torch(first) if module == "torch" and first else None


@functools.cache
def _missing_in_torch(name: str) -> NotThere | None:
    """``torch.<name>`` may be compiled; then the type stubs or the package's text mention it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return NotThere("torch", package="torch")
    folder = Path(spec.origin).parent
    texts = [folder / "__init__.py", folder / "_C" / "__init__.pyi"]
    texts.append(folder / "_C" / "_VariableFunctions.pyi")
    pattern = re.compile(rf"\b{re.escape(name)}\b")
    stubbed = [file for file in texts if file.is_file()]
    mentioned = any(pattern.search(file.read_text("utf-8")) for file in stubbed)
    if mentioned or len(stubbed) < len(texts) or module_exists(f"torch.{name}"):
        return None
    return NotThere("torch", name)


@functools.lru_cache(maxsize=4096)
def _of_name(module: str, name: str, rest: str = "") -> Parameters | None:
    if not name:
        name, _, rest = rest.partition(".")
    found = find(module, name)
    if found is None:
        return None
    if isinstance(found.node, ast.FunctionDef):
        return None if rest else _of_function(found.node, skip_first=False)
    if not isinstance(found.node, ast.ClassDef):
        return None
    return _of_method(found, rest) if rest else _of_class(found)


def _of_function(node: ast.FunctionDef, skip_first: bool) -> Parameters:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    with_default = {a.arg for a in positional[len(positional) - len(arguments.defaults) :]}
    if not arguments.defaults:
        with_default = set()
    names = [a.arg for a in positional][1 if skip_first else 0 :]
    required = [name for name in names if name not in with_default]
    optional = [name for name in names if name in with_default]
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        (required if default is None else optional).append(argument.arg)
    return Parameters(tuple(required), tuple(optional), arguments.kwarg is not None)


def _of_method(found: Found, chain: str) -> Parameters | None:
    if "." in chain:
        return None
    member = _member(found, chain)
    if not isinstance(member, ast.FunctionDef):
        return None
    static = any(ast.unparse(mark) == "staticmethod" for mark in member.decorator_list)
    return _of_function(member, skip_first=not static)


def _member(found: Found, name: str) -> ast.AST | None:
    """The definition of a class attribute; None when it may exist without one.

    Raises:
        NotThere: when all base classes are known and none has it.
    """
    complete = True
    for owner in _ancestry(found):
        if owner is None:
            complete = False
            continue
        for node in owner.node.body:  # type: ignore[attr-defined]
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return node
            if isinstance(node, ast.Assign) and name in ast.unparse(node.targets[0]):
                return None
    if complete:
        raise NotThere(found.module, f"{found.node.name}.{name}")  # type: ignore[attr-defined]
    return None


def _of_class(found: Found) -> Parameters | None:
    """Join the ``__init__`` of a class with those that its ``**kwargs`` go to."""
    if _is_dataclass(found.node):
        return _of_dataclass(found)
    required: list[str] = []
    optional: list[str] = []
    for owner in _ancestry(found):
        if owner is None:
            return Parameters(tuple(required), tuple(optional), any_keyword=True)
        if _is_dataclass(owner.node):
            inherited = _of_dataclass(owner)
            if inherited is None:
                return None
            return _joined(required, optional, inherited)
        init = _own_init(owner.node)
        own = _of_function(init, skip_first=True) if init else None
        if own is None or init is None:
            continue
        required += [name for name in own.required if name not in (*required, *optional)]
        optional += [name for name in own.optional if name not in (*required, *optional)]
        if not own.any_keyword:
            return Parameters(tuple(required), tuple(optional))
        if "super().__init__" not in ast.unparse(init) or "**" not in ast.unparse(init):
            return Parameters(tuple(required), tuple(optional), any_keyword=True)
    return Parameters(tuple(required), tuple(optional))


def _joined(required: list[str], optional: list[str], more: Parameters) -> Parameters:
    return Parameters((*required, *more.required), (*optional, *more.optional), more.any_keyword)


def _own_init(node: ast.AST) -> ast.FunctionDef | None:
    for item in getattr(node, "body", []):
        if isinstance(item, ast.FunctionDef) and item.name in INSTANCE:
            return item
    return None


def _is_dataclass(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and any(
        "dataclass" in ast.unparse(mark) for mark in node.decorator_list
    )


def _of_dataclass(found: Found) -> Parameters | None:
    required: list[str] = []
    optional: list[str] = []
    for owner in _ancestry(found):
        if owner is None:
            return None
        init = _own_init(owner.node)
        if init is not None:
            return _of_function(init, skip_first=True)
        for node in getattr(owner.node, "body", []):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            if "ClassVar" in ast.unparse(node.annotation):
                continue
            if node.value is not None and "init=False" in ast.unparse(node.value):
                continue
            (required if node.value is None else optional).append(node.target.id)
    return Parameters(tuple(n for n in required if n not in optional), tuple(optional))


def _ancestry(found: Found) -> list[Found | None]:
    """The class and its bases in the order of method resolution; None for one that is unreadable.

    A base that several classes share comes after all of them.
    """
    bases = list(_bases(found))
    last = {key: place for place, (key, _) in enumerate(bases)}
    return [base for place, (key, base) in enumerate(bases) if last[key] == place]


def _bases(found: Found, depth: int = 8) -> Iterator[tuple[tuple[str, str], Found | None]]:
    """The class and its bases, depth first, each with its module and name."""
    yield (found.module, found.node.name), found  # type: ignore[attr-defined]
    for base in getattr(found.node, "bases", []):
        name = ast.unparse(base).partition("[")[0]
        if name in ("object", "ABC", "Generic", "Protocol", "abc.ABC"):
            continue
        try:
            inner = find(found.module, name) if "." not in name else None
        except NotThere:
            inner = None
        if inner is None or not isinstance(inner.node, ast.ClassDef) or depth == 0:
            yield (found.module, name), None
        else:
            yield from _bases(inner, depth - 1)


def _of_callable(target: Callable[..., object]) -> Parameters | None:
    """By the signature itself: for objects that are imported already."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return None
    required: list[str] = []
    optional: list[str] = []
    any_keyword = False
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            any_keyword = True
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            (required if parameter.default is parameter.empty else optional).append(name)
    return Parameters(tuple(required), tuple(optional), any_keyword)
