"""Several processes: turns this command into torchrun before torch is loaded.

``NPROC_PER_NODE``, ``NNODES``, ``NODE_RANK``, ``ADDR`` and ``PORT`` say how many and where, as
published guides have them.
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xtuner.utils.cpu import threads_each
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

LAST_PORT = 65535
PATIENCE = 10.0
"""Seconds that a machine waits for the first one's name, which a cluster may publish late."""


@dataclass(frozen=True)
class Layout:
    """How many processes on how many machines, and where they meet."""

    processes: int
    nodes: int
    rank: int
    address: str
    port: int

    def command(self, words: Sequence[str], rank: int | None = None) -> list[str]:
        """The words after ``python`` that start this machine's processes of ``xtuner WORDS``."""
        return [
            "-m",
            "xtuner.engine.torchrun",
            f"--nnodes={self.nodes}",
            f"--node_rank={self.rank if rank is None else rank}",
            f"--nproc_per_node={self.processes}",
            f"--master_addr={self.address}",
            f"--master_port={self.port}",
            "-m",
            "xtuner",
            *words,
        ]


def read_layout(environment: Mapping[str, str], processes: int | None = None) -> Layout | None:
    """Read the layout from the environment.

    Args:
        environment: the environment variables.
        processes: processes of this machine; overrides ``NPROC_PER_NODE``.

    Returns:
        None when one process is all that is asked for, or when torchrun has started us already.
    """
    if "LOCAL_RANK" in environment:
        return None
    nodes = _number(environment, "NNODES", 1)
    count = processes or _number(environment, "NPROC_PER_NODE", 1)
    if nodes == 1 and count == 1:
        return None
    if nodes > 1 and "PORT" not in environment:
        raise UserError(
            tr("NNODES={nodes} needs a PORT that all machines agree on.", nodes=nodes),
            hint="PORT=29500 ADDR=<host of the first machine> NODE_RANK=<0, 1, ...> xtuner ...",
        )
    rank, port = _number(environment, "NODE_RANK", 0), _number(environment, "PORT", 0)
    if rank >= nodes:
        raise UserError(
            tr(
                "NODE_RANK={rank} with NNODES={nodes}: the ranks are 0 to {last}.",
                rank=rank,
                nodes=nodes,
                last=nodes - 1,
            )
        )
    if port > LAST_PORT:
        raise UserError(tr("PORT={port}: ports go up to {last}.", port=port, last=LAST_PORT))
    return Layout(
        processes=count,
        nodes=nodes,
        rank=rank,
        address=environment.get("ADDR", "127.0.0.1"),
        port=port or free_port(),
    )


def require_free_port(port: int) -> None:
    """Check that the processes can meet at a port of this machine.

    Raises:
        UserError: when another process uses it, or this user may not.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                tr("port {port} cannot be used: {why}.", port=port, why=error.strerror),
                hint=tr("choose another, such as PORT={port}.", port=free_port()),
            ) from error


def require_address(name: str, address: str, patience: float = 0.0) -> None:
    """Check that the address at which processes meet is one: torch would try for minutes.

    Args:
        name: of the environment variable that has it.
        address: a host name or an IP address.
        patience: seconds to try for.

    Raises:
        UserError: when it cannot be resolved.
    """
    until = time.monotonic() + patience
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= until:
                why = getattr(error, "strerror", None) or str(error)
                raise UserError(
                    tr(
                        "{name}={address} is not the address of a machine: {why}.",
                        name=name,
                        address=address,
                        why=why,
                    ),
                    hint=tr(
                        "give the host name or the IP address of the machine on which NODE_RANK=0 "
                        "runs."
                    ),
                ) from error
        time.sleep(1)


def start_processes(launcher: str, words: Sequence[str]) -> None:
    """Become torchrun where the environment asks for several processes; else check where they meet.

    Args:
        launcher: that started this process; ``none`` for a command as typed.
        words: the words after ``xtuner`` for each process.

    Raises:
        UserError: when they cannot meet.
    """
    if launcher == "none":
        layout = read_layout(os.environ)
        if layout is not None:
            become_torchrun(layout, words)
        return
    given = next((name for name in ("MASTER_ADDR", "ADDR") if os.environ.get(name)), None)
    if given:
        require_address(given, os.environ[given], PATIENCE)


def free_port() -> int:
    """A port on which nothing listens, below those that Linux gives to outgoing connections."""
    while True:
        port = random.SystemRandom().randint(20_000, 29_999)  # whatever seed a program has set
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def become_torchrun(layout: Layout, words: Sequence[str]) -> None:
    """Replace this process by torchrun, whose exit status becomes ours. Does not return.

    The first machine of several tells what to type on the others.

    Args:
        layout: the processes.
        words: the words after ``xtuner`` for each of them.

    Raises:
        UserError: when they cannot meet at their address and port.
    """
    require_address("ADDR", layout.address, PATIENCE if layout.rank else 0.0)
    if layout.rank == 0:
        require_free_port(layout.port)
    if layout.nodes > 1 and layout.rank == 0:
        print(tr("On the other machines, type:"))
        for rank in range(1, layout.nodes):
            settings = f"NPROC_PER_NODE={layout.processes} NNODES={layout.nodes} NODE_RANK={rank}"
            where = f"ADDR={layout.address} PORT={layout.port}"
            print(f"  {settings} {where} xtuner {shlex.join(words)}")
    sys.stdout.flush()
    sys.stderr.flush()
    # Without it every process would take all cores for its matrix products, or torchrun leave one.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, str(threads_each(layout.processes)))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until torchrun passes it on: by default it ends
    os.execv(sys.executable, [sys.executable, *layout.command([*words, "--launcher", "pytorch"])])


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    if not text.isdigit():
        raise UserError(tr("{name}={text} is not a number.", name=name, text=text))
    return int(text)
