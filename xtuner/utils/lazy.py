"""Lazy re-exports (PEP 562), so that importing a package costs nothing until a name is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(
    package: str, modules: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make the ``__getattr__``, ``__dir__`` and ``__all__`` of a package that loads names on use.

    Args:
        package: the package's ``__name__``.
        modules: for each submodule (relative, without the leading dot) the names it provides.

    Returns:
        The two functions and the list of names, to be assigned at module level.

    Example:
        ``__getattr__, __dir__, __all__ = lazy_exports(__name__, {"sft": ("SupervisedFinetune",)})``
    """
    home = {name: f"{package}.{module}" for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home[name]), name)

    def __dir__() -> list[str]:
        return sorted(home)

    return __getattr__, __dir__, sorted(home)
