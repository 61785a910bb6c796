"""Ending one process of several without a crash in the destructors of C++ libraries."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn


def exit_with(command: Callable[[], int]) -> NoReturn:
    """Run a command, then end this process with its status after Python's own exit handlers.

    The threads of torch's process groups may still run when C++ destroys its static objects; then
    the process aborts after its work is done, and the run counts as failed.
    ``destroy_process_group`` joins these threads, and a command that succeeds calls it. A rank that
    ends with an error cannot: the others may be waiting in a collective. So it stays needed, with
    torch 2.8 and later too.

    Args:
        command: returns the exit status, or raises ``SystemExit``.
    """
    try:
        status = command()
    except SystemExit as asked:  # of a rank that ends without a message of its own
        status = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
