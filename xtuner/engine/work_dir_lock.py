"""One run in a work dir at a time: two would overwrite each other's files.

The lock is a file that names host and process and that its owner touches every few seconds. A lock
is stale when its process has ended or, on another machine or in another container, when the file
has not been touched for a while; then it passes to the next run. So it holds on file systems
without locks of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.process_identity import ProcessIdentity

NAME = ".run.lock"
GUARD = ".before_run.lock"
"""Processes of one machine that look at the lock take turns."""
TOUCH_EVERY = 15.0
LOOK_EVERY = 1.0
STALE_AFTER = 120.0
"""Seconds; a machine that is busy or swapping may miss a few touches."""


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
        if earlier is not None and earlier != ProcessIdentity.this():
            print(
                tr(
                    "a run of process {process} on {host} ended without giving this work dir back.",
                    process=earlier.process,
                    host=earlier.host,
                )
            )
        file.write_text(json.dumps(asdict(ProcessIdentity.this())) + "\n", "utf-8")
    ended = threading.Event()
    threading.Thread(target=_keep_touching, args=(file, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if _owner(file) == ProcessIdentity.this():
            with contextlib.suppress(OSError):  # a disk gone read-only has ended the run: say that
                file.unlink(missing_ok=True)


def require_free(work_dir: Path) -> None:
    """Check that no other run holds a work dir's lock, without taking it.

    The lock of a process whose number cannot be looked up here is watched until it is touched, or
    long enough to be stale: a container that is started again finds the lock of its predecessor.

    Raises:
        UserError: when one does.
    """
    file = work_dir / NAME
    owner = _owner(file)
    if owner is None or owner == ProcessIdentity.this() or _has_ended(owner, file):
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


def _has_ended(owner: ProcessIdentity, file: Path) -> bool:
    """Whether the process that has a lock runs no more, as far as can be told."""
    if owner.is_here():
        return owner.has_ended()
    touched, left = _touched(file), STALE_AFTER - max(0.0, _silent_for(file))
    if left > 0:
        print(
            tr(
                "process {process} on {host} has this work dir; waiting up to {seconds:.0f} s to "
                "see whether it still runs.",
                process=owner.process,
                host=owner.host,
                seconds=left,
            ),
            flush=True,
        )
    until = time.monotonic() + left
    while touched and _touched(file) == touched and time.monotonic() < until:
        time.sleep(LOOK_EVERY)
    return _touched(file) in (0.0, touched)


def _owner(file: Path) -> ProcessIdentity | None:
    """Who has the lock; None where there is none, or what is there says nothing."""
    try:
        content = json.loads(file.read_text("utf-8"))
        texts = {name: str(content[name]) for name in ("host", "started")}
        texts["system"] = str(content.get("system", ""))
        return ProcessIdentity(process=int(content["process"]), **texts)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _silent_for(file: Path) -> float:
    """Seconds since the file was touched, by the clock of the file system that it is on."""
    probe = file.with_name(f"{NAME}.now")
    probe.write_text("", "utf-8")
    now = probe.stat().st_mtime
    probe.unlink()
    return now - _touched(file)


def _touched(file: Path) -> float:
    """When the file was touched; 0 where it is gone."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _keep_touching(file: Path, ended: threading.Event) -> None:
    while not ended.wait(TOUCH_EVERY):
        with contextlib.suppress(OSError):
            os.utime(file)
