"""Standard output that is JSON alone, for commands with ``--json``."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TextIO

_FOR_JSON: ContextVar[TextIO | None] = ContextVar("_FOR_JSON", default=None)
"""Where ``print_json`` prints, while other text goes to stderr."""


def print_json(value: object) -> None:
    """Print plain data as JSON on the standard output that the command was started with.

    JSON has no name for a number that is not finite: it becomes null.
    """
    text = json.dumps(_finite(value), ensure_ascii=False, indent=2)
    print(text, file=_FOR_JSON.get() or sys.stdout, flush=True)


@contextlib.contextmanager
def json_alone() -> Iterator[None]:
    """Send all that is printed meanwhile to stderr, except by ``print_json``.

    Configs, map functions and libraries print what they like: by ``print``, by C code, in processes
    that they start.
    """
    sys.stdout.flush()
    with contextlib.ExitStack() as undo:
        kept = undo.enter_context(os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding))
        os.dup2(2, 1)
        undo.callback(os.dup2, kept.fileno(), 1)
        undo.callback(sys.stdout.flush)  # what a handler wrote that has this stream
        out = kept if _descriptor(sys.stdout) == 1 else sys.stdout
        token = _FOR_JSON.set(out)
        undo.callback(_FOR_JSON.reset, token)
        undo.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _descriptor(stream: TextIO) -> int | None:
    """The number of a stream's file; None of one that is in memory."""
    try:
        return stream.fileno()
    except (OSError, AttributeError):
        return None
