"""Which process wrote a file, and whether it still runs.

A process's number says nothing in another container or on another machine, even one of the same
host name, nor after a restart. So the kernel's boot and the namespace of the numbers are part of an
identity.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"(\d+)-(\d*)-([0-9a-f]+)")


@dataclass(frozen=True)
class ProcessIdentity:
    """A process on some machine.

    Args:
        process: its number.
        started: when it was started, in the kernel's ticks; '' where not known.
        system: where its number counts, see ``this_system``.
        host: the name of the machine or container, for messages.
    """

    process: int
    started: str
    system: str
    host: str = ""

    @classmethod
    def this(cls) -> ProcessIdentity:
        """This process."""
        return cls(os.getpid(), started(os.getpid()), this_system(), socket.gethostname())

    @classmethod
    def of_name(cls, name: str) -> ProcessIdentity | None:
        """The process of a ``name()``; None for any other text."""
        match = _NAME.fullmatch(name)
        return cls(int(match[1]), match[2], match[3]) if match else None

    def name(self) -> str:
        """The identity as part of a file name, without the host."""
        return f"{self.process}-{self.started}-{self.system}"

    def is_here(self) -> bool:
        """Whether its number can be looked up by this process."""
        return self.system == this_system()

    def has_ended(self) -> bool:
        """Whether it runs no more; to be asked only where it ``is_here``."""
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it is another user's
            return False
        return self.started != started(self.process)  # the number was given to another one


def this_system() -> str:
    """A digest of the kernel's boot id and the namespace of process numbers.

    Of the host's name where there is no ``/proc``.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        known = f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 (it leads nowhere)
    except OSError:
        known = socket.gethostname()
    return hashlib.sha256(known.encode()).hexdigest()[:12]


def started(process: int) -> str:
    """When a process was started, in the kernel's ticks; '' where there is no ``/proc``."""
    try:
        text = Path(f"/proc/{process}/stat").read_text("utf-8", errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]
