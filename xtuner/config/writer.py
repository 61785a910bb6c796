"""Values as Python source, with the import statements that they need."""

from __future__ import annotations

import math

from xtuner.config.definitions import PREFIX as DEFINITIONS
from xtuner.config.values import dotted_name, is_argument_name, is_local_function

WIDTH = 96


class Writer:
    """Writes values as Python and collects the imports that they need.

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

    def line(self, value: object) -> str:
        """A value on one line."""
        if isinstance(value, dict):
            pairs = list(dict.items(value))
            if all(is_argument_name(key) for key, _ in pairs):
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
        if is_local_function(value):
            return str(value.__name__)
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        return repr(value)

    def lines(self, value: object, indent: int = 0) -> str:
        """A value on one line where it fits, else an item a line."""
        line = self.line(value)
        if len(line) + indent <= WIDTH or not isinstance(value, dict | list | tuple) or not value:
            return line
        inner = " " * (indent + 4)
        if isinstance(value, dict):
            pairs = list(dict.items(value))
            as_call = line.startswith("dict(")
            items = [
                (f"{k}=" if as_call else f"{k!r}: ") + self.lines(v, indent + 4) for k, v in pairs
            ]
            begin, end = ("dict(", ")") if as_call else ("{", "}")
        else:
            items = [self.lines(item, indent + 4) for item in value]
            begin, end = ("[", "]") if isinstance(value, list) else ("(", ")")
        return f"{begin}\n" + "".join(f"{inner}{item},\n" for item in items) + " " * indent + end

    def _imported(self, module: str, name: str, rest: str = "") -> str:
        if module.startswith(DEFINITIONS):  # what the config defines itself
            return f"{name}.{rest}" if rest else name
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
