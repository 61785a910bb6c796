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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xtuner.utils.cpu import threads_each
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr


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
    return Layout(
        processes=count,
        nodes=nodes,
        rank=_number(environment, "NODE_RANK", 0),
        address=environment.get("ADDR", "127.0.0.1"),
        port=_number(environment, "PORT", 0) or free_port(),
    )


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
    """
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
