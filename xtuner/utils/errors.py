"""Errors that users can cause and fix: shown as one clear message, never as a traceback.

Raise ``UserError`` for everything a user can fix (a path, a key, a row, a missing package);
keep ``assert`` and plain exceptions for our own bugs. ``entry_point`` prints the message and exits
with the status; ``--debug`` shows the traceback as well.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass

from xtuner.utils.lang import tr


@dataclass
class Where:
    """A place in something the user wrote: a file, and within it a line, a key or a row."""

    file: str | None = None
    line: int | None = None
    key: str | None = None

    def __str__(self) -> str:
        place = self.file or ""
        if self.line is not None:
            place += f":{self.line}"
        if self.key:
            place += f" ({self.key})" if place else self.key
        return place


class BadRowError(ValueError):
    """What is wrong with a row of data, in words for people."""


class UserError(Exception):
    """A mistake that the user can fix.

    Args:
        message: what is wrong: what was found and what was expected.
        hint: what to do about it, as one or more full sentences or a command to type.
        where: the place, if there is one.
        status: the exit status of the command, not 0.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        where: Where | None = None,
        status: int = 1,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.where = where
        self.status = status

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where and str(self.where) else ""
        hint = f"\n{tr('Hint: ')}{self.hint}" if self.hint else ""
        return f"{place}{self.message}{hint}"


class RunStopped(UserError):
    """The end of a run that was asked to stop: shown as it is, not as an error."""


@contextlib.contextmanager
def activity(what: str, folder: str | None = None) -> Iterator[None]:
    """Name what is being done, for the report of an error that nobody foresaw.

    Args:
        what: in the user's language, such as "building the model".
        folder: the work dir, where the traceback is to be written.
    """
    try:
        yield
    except Exception as error:
        inner, inner_folder = activity_of(error)
        error.__dict__["xtuner_activity"] = (inner or what, inner_folder or folder)
        raise


def activity_of(error: BaseException) -> tuple[str, str | None]:
    """What was being done when an error was raised, and the work dir; empty where not known."""
    what, folder = error.__dict__.get("xtuner_activity", ("", None))
    return what, folder


_NAMES = {"liger_kernel": "liger-kernel", "flash_attn": "flash-attn"}
"""What pip calls packages whose module has another name."""


def require(module: str, *, extra: str, purpose: str) -> None:
    """Check that an optional package is installed.

    Args:
        module: the module that must be importable, for example ``deepspeed``.
        extra: the extra of this package that brings it, for example ``deepspeed``.
        purpose: what it is needed for, put into the message.

    Raises:
        UserError: when the package is not installed.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise UserError(
            tr(
                "{purpose} needs the package {module!r}, which is not installed.",
                purpose=purpose,
                module=module,
            ),
            hint=f"pip install {_NAMES.get(module, module)}",
        )


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error of a library, for a message of one line; its class if none."""
    first_line = str(error).strip().partition("\n")[0]
    return re.split(r"(?<=[\w)\]'\"]{2})\. (?=[A-Z])", first_line)[0] or type(error).__name__
