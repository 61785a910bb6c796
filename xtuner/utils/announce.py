"""Say that libraries are being loaded: the large ones take seconds, in which nothing else is."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from xtuner.utils.lang import tr

LARGE = ("torch", "transformers", "datasets")


class _Announcer(MetaPathFinder):
    """Finds the large libraries as everybody does; the first that is run is announced."""

    def __init__(self) -> None:
        self.looking = False
        self.said = False

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname not in LARGE or self.said or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            loader = spec.loader

            def run(module: ModuleType) -> None:
                del vars(loader)["exec_module"]
                self._say()
                loader.exec_module(module)

            vars(loader)["exec_module"] = run
        return spec

    def _say(self) -> None:
        if not self.said:
            self.said = True
            print(tr("loading the libraries ..."), file=sys.stderr, flush=True)


@contextlib.contextmanager
def announced_libraries() -> Iterator[None]:
    """Print a line to stderr when a large library is imported for the first time.

    Of several processes only the first says so.
    """
    announcer = _Announcer()
    if os.environ.get("RANK", "0") == "0" and not any(name in sys.modules for name in LARGE):
        sys.meta_path.insert(0, announcer)
    try:
        yield
    finally:
        if announcer in sys.meta_path:
            sys.meta_path.remove(announcer)
        announcer.said = True  # a loader may still have its run
