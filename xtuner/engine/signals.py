"""Signals from the first moment of ``train`` on; while it trains ``engine.stop`` takes them over.

By default SIGUSR1, by which Slurm announces a time limit, ends a process, and SIGTERM and SIGHUP
end it without a word. This module imports nothing heavy, as it comes before everything else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from xtuner.utils.lang import tr

ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Beside SIGINT, for which Python raises ``KeyboardInterrupt``."""
SAVING = signal.SIGUSR1


class EndedBySignalError(KeyboardInterrupt):
    """The command ends now.

    Args:
        number: of the signal.

    Attributes:
        status: the exit status of the command, 128 + ``number``.
    """

    def __init__(self, number: int) -> None:
        super().__init__(
            tr(
                "{signal} was received: ended at once, without another checkpoint.",
                signal=signal.Signals(number).name,
            )
        )
        self.status = 128 + number


class _Noted:
    """What signals have asked for before there was a training to do it."""

    save = False


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handle signals while a command runs; in the main thread, elsewhere nothing is done.

    SIGTERM and SIGHUP raise ``EndedBySignalError``, SIGUSR1 is noted for ``take_save_request``. A
    signal that is ignored, as ``nohup`` has SIGHUP ignored, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own, previous = os.getpid(), {}

    def end(number: int, frame: FrameType | None) -> None:
        for each in ENDING:
            signal.signal(each, signal.SIG_DFL)  # a second signal does not wait for Python
        if os.getpid() != own:  # a process that was forked for data
            os.kill(os.getpid(), number)
        raise EndedBySignalError(number)

    def save(number: int, frame: FrameType | None) -> None:
        _Noted.save = True
        if os.getpid() == own and os.environ.get("RANK", "0") == "0":
            say(tr("SIGUSR1 was received: a checkpoint is written after the next optimizer step."))

    _Noted.save = False
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, end)
    previous[SAVING] = signal.signal(SAVING, save)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def take_save_request() -> bool:
    """Whether SIGUSR1 came before the training; it is forgotten after that."""
    asked, _Noted.save = _Noted.save, False
    return asked


def say(line: str) -> None:
    """Write to stderr from a signal handler, where a stream may be in use."""
    with contextlib.suppress(OSError):  # a closed terminal
        os.write(sys.stderr.fileno() if sys.stderr else 2, f"\n{line}\n".encode())
