"""The end of one process of several, without the crashes that C++ libraries have at their end."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn


def exit_with(command: Callable[[], int]) -> NoReturn:
    """Run a command, then end this process with its status once all of Python's own has ended.

    The threads of torch's process groups are now and then still running when C++ takes its static
    objects apart. Then the process aborts, although its work is done, and the run counts as failed.
    """
    try:
        status = command()
    except SystemExit as asked:  # of a rank that leaves without a message of its own
        status = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
