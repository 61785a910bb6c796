"""The process group of a run: joined whichever launcher started the processes, and left again."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import torch

from xtuner.parallel.heartbeat import start_heartbeat, stop_heartbeat
from xtuner.parallel.launch_env import LAUNCHER_ENV, collective_timeout
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

DEFAULT_PORT = "29500"
_PR_SET_PDEATHSIG = 1  # of Linux' prctl
_on_shutdown: list[Callable[[], None]] = []


def init_distributed(launcher: str, backend: str = "nccl") -> None:
    """Initialize the process group and select this process's GPU.

    Collective operations wait for ``XTUNER_DATASET_TIMEOUT`` minutes (60 by default), so that a
    machine which prepares its data for longer than another does not end the run.

    Args:
        launcher: ``pytorch`` (torchrun), ``slurm`` or ``mpi``.
        backend: ``nccl`` on GPUs, ``gloo`` on a CPU.

    Raises:
        UserError: when the launcher's environment variables are not set.
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
        _terminate_with_parent()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(local_rank) % torch.cuda.device_count())
    torch.distributed.init_process_group(backend, timeout=collective_timeout())
    start_heartbeat()


def on_shutdown(callback: Callable[[], None]) -> None:
    """Register what ``shutdown_distributed`` calls before it destroys the process group.

    Args:
        callback: for example drops references to subgroups. Registered twice, it is called once.
    """
    if callback not in _on_shutdown:
        _on_shutdown.append(callback)


def shutdown_distributed() -> None:
    """Destroy the process group at the end of a successful command; nothing without one."""
    if torch.distributed.is_initialized():
        stop_heartbeat()
        for callback in _on_shutdown:
            callback()
        torch.distributed.destroy_process_group()


def init_single_process() -> None:
    """Initialize a process group of this process alone, where there is none: libraries need one."""
    if torch.distributed.is_initialized():
        return
    if "LOCAL_RANK" not in os.environ:  # DeepSpeed asks for it
        os.environ["LOCAL_RANK"] = "0"
        on_shutdown(_forget_local_rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(
        backend, store=torch.distributed.HashStore(), rank=0, world_size=1
    )


def _forget_local_rank() -> None:
    """A command started by this process would take it for a launcher's."""
    os.environ.pop("LOCAL_RANK", None)


def _terminate_with_parent() -> None:
    """Ask Linux for SIGTERM when torchrun dies, also by SIGKILL, so that no process is orphaned."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _first_host(launcher: str) -> str:
    """The first host of a Slurm job; this one otherwise."""
    nodes = os.environ.get("SLURM_NODELIST")
    if launcher != "slurm" or not nodes:
        return "127.0.0.1"
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
    )
    return listed.stdout.split()[0]
