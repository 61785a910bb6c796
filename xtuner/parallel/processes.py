"""Joining the processes of a run into one group, whoever started them."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import signal
import subprocess
import sys

import torch

from xtuner.parallel.heartbeat import start_heartbeat, stop_heartbeat
from xtuner.utils.environment import dataset_timeout
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

DEFAULT_PORT = "29500"
_SET_PARENT_DEATH_SIGNAL = 1  # of Linux' prctl
# Who started us -> the variables in which it tells rank, world size and rank on this machine.
LAUNCHER_ENV = {
    "pytorch": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}


def init_distributed(launcher: str, backend: str = "nccl") -> None:
    """Join the process group, and take this process's GPU.

    Collective operations wait for ``XTUNER_DATASET_TIMEOUT`` minutes (60 by default), so that a
    machine which prepares its data for longer than another does not end the run.

    Args:
        launcher: ``pytorch`` (torchrun), ``slurm`` or ``mpi``.
        backend: ``nccl`` on GPUs, ``gloo`` on a CPU.
    """
    names = LAUNCHER_ENV[launcher]
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(
            tr(
                "--launcher {launcher} expects {missing} in the environment.",
                launcher=launcher,
                missing=", ".join(missing),
            ),
            hint=tr("NPROC_PER_NODE=2 xtuner train ... starts two processes by itself."),
        )
    rank, world_size, local_rank = (os.environ[name] for name in names)
    os.environ |= {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank}
    os.environ.setdefault("MASTER_PORT", os.environ.get("PORT", DEFAULT_PORT))
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = os.environ.get("ADDR") or _first_host(launcher)
    if launcher == "pytorch":
        _end_with_parent()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(local_rank) % torch.cuda.device_count())
    torch.distributed.init_process_group(backend, timeout=timeout())
    start_heartbeat()


def timeout() -> datetime.timedelta:
    """How long collective operations wait."""
    return datetime.timedelta(minutes=max(30.0, dataset_timeout()))


def shutdown_distributed() -> None:
    """Take leave of the other processes, when all has gone well."""
    from xtuner.parallel.sequence.groups import destroy_sequence_parallel

    if torch.distributed.is_initialized():
        stop_heartbeat()
        destroy_sequence_parallel()
        torch.distributed.destroy_process_group()


def init_single_process() -> None:
    """Make a process group of this process, where there is none: some libraries need one."""
    if torch.distributed.is_initialized():
        return
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(
        backend, store=torch.distributed.HashStore(), rank=0, world_size=1
    )


def _end_with_parent() -> None:
    """Ask Linux for SIGTERM when torchrun dies, by kill -9 too: no process is left behind."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _first_host(launcher: str) -> str:
    """The first machine of a Slurm job; this one otherwise."""
    nodes = os.environ.get("SLURM_NODELIST")
    if launcher != "slurm" or not nodes:
        return "127.0.0.1"
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
    )
    return listed.stdout.split()[0]
