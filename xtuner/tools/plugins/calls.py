"""Reading what a model calls, such as ``Calculate(1+2), Solve(x^2=4)``, and running it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Sequence

from xtuner.utils.errors import UserError

_NAME = re.compile(r"\s*,?\s*([A-Za-z]+)\(")
_KNOWN = {
    "calculate": "calculate",
    "calculator": "calculate",
    "solve": "solve",
    "search": "search",
}


def make_runner(plugins: Sequence[str]) -> Callable[[str], str]:
    """Make the function that runs the calls in a text.

    Args:
        plugins: those that may be used: ``calculate``, ``solve``, ``search``.

    Returns:
        Text of calls -> text of results, one line ``Name(argument) => result`` a call.
    """

    def run(text: str) -> str:
        lines = [
            f"{name}({argument}) => {_run_one(name, argument, plugins)}\n"
            for name, argument in read_calls(text)
        ]
        return "".join(lines) or "None\n"

    return run


def read_calls(text: str) -> Iterator[tuple[str, str]]:
    """The calls in a text: name and argument; quotes around the argument are dropped."""
    place = 0
    while match := _NAME.match(text, place):
        end = _closing(text, match.end())
        yield match[1], text[match.end() : end].strip().strip("\"'")
        place = end + 1


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that was opened before ``start`` closes; the end if it does not."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def _run_one(name: str, argument: str, plugins: Sequence[str]) -> str:
    plugin = _KNOWN.get(name.lower())
    if plugin is None or plugin not in plugins:
        return f"there is no tool {name}"
    function = getattr(importlib.import_module(f"xtuner.tools.plugins.{plugin}"), plugin)
    try:
        return str(function(argument))
    except UserError as error:
        return str(error).replace("\n", " ")
