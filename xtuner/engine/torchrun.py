"""Starts the processes of one machine, as torchrun does, with the exit status of the first failure.

Started as ``python -m xtuner.engine.torchrun`` with torchrun's own arguments. torchrun turns every
failure into status 1 and prints a table of tracebacks; here the message of the process that failed
is the last output.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr


def main(arguments: Sequence[str]) -> int:
    """Run the processes of this machine.

    Args:
        arguments: ``--nnodes``, ``--node_rank``, ``--nproc_per_node``, ``--master_addr``,
            ``--master_port`` and ``-m MODULE ARGUMENTS...``, as for torchrun.

    Returns:
        0; or the status of the process that failed first, 128 + N when signal N ended it.
    """
    args = _parser().parse_args(arguments)
    signal.signal(signal.SIGUSR1, functools.partial(_pass_on, module=args.module))
    fill_caches()
    logging.disable(logging.ERROR)  # torch's lines would follow the message of what failed
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    rendezvous: dict[str, Any] = (
        {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(uuid.uuid4())}
        if args.master_port is None  # one machine: any free port
        else {
            "rdzv_backend": "static",
            "rdzv_endpoint": f"{args.master_addr}:{args.master_port}",
            "rdzv_configs": {"rank": args.node_rank},
            "run_id": "xtuner",
        }
    )
    config = LaunchConfig(
        min_nodes=args.nnodes,
        max_nodes=args.nnodes,
        nproc_per_node=args.nproc_per_node,
        role="default",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
        **rendezvous,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", args.module, *args.arguments)
    except ChildFailedError as error:
        code = first_exit_code([(f.timestamp, f.exitcode) for f in error.failures.values()])
        return code if code >= 0 else 128 - code
    except (DistError, RendezvousError) as error:  # before the processes are started
        print(tr("error: ") + _not_met(args, error), file=sys.stderr)
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _not_met(args: argparse.Namespace, error: Exception) -> str:
    """The message for machines that do not meet."""
    why = next(iter(str(error).splitlines()), type(error).__name__)
    return str(
        UserError(
            tr(
                "the processes cannot meet at {address}:{port}: {why}",
                address=args.master_addr,
                port=args.master_port,
                why=why,
            ),
            hint=tr(
                "ADDR and PORT are those of the first machine, on which NODE_RANK=0 must run; "
                "check the network and the firewall between the machines."
            ),
        )
    )


def first_exit_code(failures: Sequence[tuple[int, int]]) -> int:
    """The exit code of the process that failed first.

    A process whose peer is killed fails at once, and both are seen together; then the killed one
    was first. One that is killed later was killed by the launcher, as it did not end when asked to.

    Args:
        failures: the second in which each was seen, and its exit code, -N for signal N.
    """
    when, code = min(failures)[0], min(failures, key=lambda failure: failure[0])[1]
    together = [code for second, code in failures if second <= when + 1]
    return -signal.SIGKILL if -signal.SIGKILL in together else code


def fill_caches() -> None:
    """Let yapf, which mmengine imports, write its grammar into the user's cache.

    After an installation the processes would all write it, and read what another one has half
    written: ``EOFError: Ran out of input``.
    """
    import yapf  # noqa: F401


def _pass_on(number: int, frame: FrameType | None, *, module: str) -> None:
    """Send a signal on to the processes that run ``module``; Slurm sends it to this one alone."""
    for listed in Path("/proc/self/task").glob("*/children"):
        for process in listed.read_text().split():
            with contextlib.suppress(OSError):  # it has just ended
                words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
                if ("-m", module) in itertools.pairwise(words) and _handles(process, number):
                    os.kill(int(process), number)


def _handles(process: str, number: int) -> bool:
    """Whether a process handles a signal; one that has just started would be ended by it."""
    status = Path(f"/proc/{process}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (number - 1) & 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m xtuner.engine.torchrun")
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node_rank", type=int, default=0)
    parser.add_argument("--nproc_per_node", type=int, default=1)
    parser.add_argument("--master_addr", default="127.0.0.1")
    parser.add_argument("--master_port", type=int)
    parser.add_argument("-m", dest="module", required=True)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
