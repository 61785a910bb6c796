"""One run in a work dir at a time: two would overwrite each other's files.

The lock is a file that names host and process and that its owner touches every few seconds. A lock
is stale when its process has ended or, on another machine, when the file has not been touched for a
while; then it passes to the next run. So it holds on file systems without locks of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

NAME = ".run.lock"
GUARD = ".before_run.lock"
"""Processes of one machine that look at the lock take turns."""
TOUCH_EVERY = 15.0
STALE_AFTER = 120.0
"""Seconds; a machine that is busy or swapping may miss a few touches."""


@dataclass(frozen=True)
class Owner:
    """Who has a lock.

    Args:
        host: name of the machine.
        process: its id there.
        started: when the process was started, by the machine's own count; '' where not known.
    """

    host: str
    process: int
    started: str

    @classmethod
    def this(cls) -> Owner:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), _started(os.getpid()))

    def has_ended(self, silent_for: float) -> bool:
        """Whether it runs no more, as far as can be told.

        Args:
            silent_for: seconds since it touched its lock.
        """
        if self.host != socket.gethostname():
            return silent_for > STALE_AFTER
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it is another user's
            return False
        return self.started != _started(self.process)  # the number was given to another one


@contextlib.contextmanager
def locked(work_dir: Path) -> Iterator[None]:
    """Hold a work dir's lock.

    Args:
        work_dir: the folder, which exists.

    Raises:
        UserError: when another run has it.
    """
    file = work_dir / NAME
    with FileLock(work_dir.resolve() / GUARD):
        require_free(work_dir)
        earlier = _owner(file)
        if earlier is not None and earlier != Owner.this():
            print(
                tr(
                    "a run of process {process} on {host} ended without giving this work dir back.",
                    process=earlier.process,
                    host=earlier.host,
                )
            )
        file.write_text(json.dumps(asdict(Owner.this())) + "\n", "utf-8")
    ended = threading.Event()
    threading.Thread(target=_keep_touching, args=(file, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if _owner(file) == Owner.this():
            file.unlink(missing_ok=True)


def require_free(work_dir: Path) -> None:
    """Check that no other run holds a work dir's lock, without taking it.

    Raises:
        UserError: when one does.
    """
    file = work_dir / NAME
    owner = _owner(file)
    if owner is None or owner == Owner.this() or owner.has_ended(_silent_for(file)):
        return
    raise UserError(
        tr(
            "another run writes to this work dir: process {process} on {host}.",
            process=owner.process,
            host=owner.host,
        ),
        hint=tr(
            "choose another with '--work-dir', or wait. If it has ended, delete {file}.",
            file=file,
        ),
        where=Where(str(work_dir)),
    )


def _owner(file: Path) -> Owner | None:
    """Who has the lock; None where there is none, or what is there says nothing."""
    try:
        content = json.loads(file.read_text("utf-8"))
        return Owner(str(content["host"]), int(content["process"]), str(content["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _silent_for(file: Path) -> float:
    """Seconds since the file was touched, by the clock of the file system that it is on."""
    probe = file.with_name(f"{NAME}.now")
    probe.write_text("", "utf-8")
    now = probe.stat().st_mtime
    probe.unlink()
    return now - file.stat().st_mtime


def _keep_touching(file: Path, ended: threading.Event) -> None:
    while not ended.wait(TOUCH_EVERY):
        with contextlib.suppress(OSError):
            os.utime(file)


def _started(process: int) -> str:
    """When a process was started, in the kernel's ticks; '' where there is no /proc."""
    try:
        text = Path(f"/proc/{process}/stat").read_text("utf-8", errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]
