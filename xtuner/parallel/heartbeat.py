"""A heartbeat between the machines of a run, for backends that do not notice a dead link.

A process that exits closes its connections, and the others fail at once. A machine that is switched
off, or a cut link, closes nothing: gloo's collectives then wait for their timeout, an hour by
default. So one process of each machine increments a counter in the rendezvous store and reads those
of the others. A second thread ends the process when a counter has not changed for too long;
torchrun then ends the other processes of the machine.

With NCCL it is off unless ``XTUNER_LINK_TIMEOUT`` is set: NCCL's own watchdog ends a process whose
collective fails or exceeds its timeout (``TORCH_NCCL_ASYNC_ERROR_HANDLING``).
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass, field

import torch.distributed as dist

from xtuner.utils.environment import positive
from xtuner.utils.lang import tr

LIMIT = "XTUNER_LINK_TIMEOUT"
DEFAULT_LIMIT = 120.0  # seconds
STATUS = 75  # EX_TEMPFAIL: try again later
LEFT = "left"


@dataclass
class Heartbeat:
    """The counter of one machine, and when those of the others last changed.

    Args:
        store: holds the counters.
        own: the name of this machine.
        others: the names of the other machines.
        limit: seconds without a heartbeat after which the process exits.
    """

    store: dist.Store
    own: str
    others: list[str]
    limit: float
    _heard: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    _contact: float = field(default_factory=time.monotonic)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Start the two threads."""
        self._contact = time.monotonic()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        threading.Thread(target=self._watch, name="heartbeat-watch", daemon=True).start()

    def stop(self) -> None:
        """Tell the other machines that this one has finished, and stop."""
        if not self._stopped.is_set():
            self._stopped.set()
            with contextlib.suppress(RuntimeError, OSError):  # the first machine has left before us
                self.store.set(_key(self.own), LEFT)

    def lost(self) -> str | None:
        """The machines without a heartbeat for longer than the limit; None when there are none."""
        now = time.monotonic()
        if now - self._contact > self.limit:
            return tr("the first machine")
        silent = [
            name
            for name, (beat, since) in self._heard.items()
            if beat != LEFT.encode() and now - since > self.limit
        ]
        return ", ".join(silent) or None

    def _beat(self) -> None:
        number = 0
        while not self._stopped.wait(self.limit / 8):
            number += 1
            try:
                self.store.set(_key(self.own), str(number))
                for name in self.others:
                    beat = self.store.get(_key(name)) if self.store.check([_key(name)]) else b""
                    if self._heard.get(name, (None, 0.0))[0] != beat:
                        self._heard[name] = beat, time.monotonic()
            except (RuntimeError, OSError):  # closed: the first machine has left, all hear of that
                self._stopped.set()
                return
            self._contact = time.monotonic()

    def _watch(self) -> None:
        while not self._stopped.wait(self.limit / 8):
            lost = self.lost()
            if lost is None:
                continue
            print(
                tr(
                    "error: {own} has heard nothing from {lost} for {limit:g} seconds: "
                    "the machine is down or the network link is broken. Training stops here.\n"
                    "Hint: restore the link, then resume with the same command and --resume.",
                    own=self.own,
                    lost=lost,
                    limit=self.limit,
                ),
                file=sys.stderr,
                flush=True,
            )
            os._exit(STATUS)


_running: Heartbeat | None = None


def is_wanted(backend: str) -> bool:
    """Whether to run a heartbeat beside a backend: not beside NCCL, unless the limit is set."""
    return "nccl" not in backend or bool(os.environ.get(LIMIT))


def start_heartbeat() -> None:
    """Start the heartbeat of a run on several machines; called with the process group initialized.

    Every rank must call it. With NCCL it starts only where ``XTUNER_LINK_TIMEOUT`` is set.
    """
    global _running
    if not dist.is_initialized() or not is_wanted(dist.get_backend()):
        return
    leader = int(os.environ.get("LOCAL_RANK", "0")) == 0
    name = f"{socket.gethostname()} (rank {dist.get_rank()})" if leader else None
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, name)
    machines = [each for each in names if each is not None]
    if name is None or len(machines) < 2:
        return
    limit = positive(LIMIT, DEFAULT_LIMIT)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=2 * limit),  # longer than it takes to notice
    )
    others = [each for each in machines if each != name]
    _running = Heartbeat(store, name, others, limit)
    _running.start()


def stop_heartbeat() -> None:
    """Stop without alarming the other machines."""
    if _running is not None:
        _running.stop()


def _key(name: str) -> str:
    return f"xtuner/alive/{name}"
