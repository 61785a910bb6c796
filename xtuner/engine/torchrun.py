"""Starts the processes of one machine, as torchrun does, with the exit status of the first failure.

Started as ``python -m xtuner.engine.torchrun`` with torchrun's own arguments. torchrun turns every
failure into status 1 and prints a table of tracebacks; here the message of the process that failed
is the last output.
"""

from __future__ import annotations

import argparse
import sys
import uuid
from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str]) -> int:
    """Run the processes of this machine.

    Args:
        arguments: ``--nnodes``, ``--node_rank``, ``--nproc_per_node``, ``--master_addr``,
            ``--master_port`` and ``-m MODULE ARGUMENTS...``, as for torchrun.

    Returns:
        0; or the status of the process that failed first, 128 + N when signal N ended it.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    args = _parser().parse_args(arguments)
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
        _, first = error.get_first_failure()
        return int(first.exitcode if first.exitcode >= 0 else 128 - first.exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


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
