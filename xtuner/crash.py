"""What a user sees of an error that nobody foresaw: three lines; the traceback goes to a file."""

from __future__ import annotations

import os
import tempfile
import traceback
from pathlib import Path

from xtuner.library_errors import causes, one_line
from xtuner.utils.errors import activity_of
from xtuner.utils.lang import tr

INTERNAL_ERROR = 70
"""The exit status (``EX_SOFTWARE`` of sysexits.h)."""


def report(error: BaseException, command: str) -> str:
    """Write the traceback to a file and give the three lines for the screen.

    Args:
        error: what was raised.
        command: the command line, to say what was being done.

    Returns:
        What was being done, the cause in one line, and where the traceback is.
    """
    what, folder = activity_of(error)
    doing = f"{command}: {what}" if what else command
    text = f"{doing}\n\n{''.join(traceback.format_exception(error))}"
    *_, innermost = causes(error)
    return "\n".join(
        [
            doing,
            tr("  cause: {cause}", cause=one_line(innermost)),
            tr("  full traceback: {place}", place=_write(text, folder)),
        ]
    )


def _write(text: str, folder: str | None) -> str:
    """Write the report into the work dir; where that cannot be, to a temporary file."""
    rank = os.environ.get("RANK", "0")
    name = "crash.txt" if rank == "0" else f"crash_rank{rank}.txt"
    if folder is not None:
        try:
            path = Path(folder) / name
            path.write_text(text, "utf-8", "backslashreplace")
            return str(path)
        except OSError:
            pass  # a full disk may be why we are here
    try:
        handle, path_name = tempfile.mkstemp(prefix="xtuner-crash-", suffix=".txt", text=True)
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
        return path_name
    except OSError as error:
        return tr("not written ({why}); --debug shows it", why=error.strerror)
