"""What launchers tell a process through its environment, and how long collectives may wait."""

from __future__ import annotations

import datetime
import os

from xtuner.utils.environment import dataset_timeout

LAUNCHER_ENV = {
    "pytorch": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
"""Launcher -> the environment variables with the rank, the world size and the local rank."""
MIN_TIMEOUT = 30.0
"""Minutes, PyTorch's own default."""


def env_rank() -> int | None:
    """The rank that a launcher gave to this process; None for a process that none has started.

    It is known before there is a process group.
    """
    for rank, _, _ in LAUNCHER_ENV.values():
        if os.environ.get(rank):
            return int(os.environ[rank])
    return None


def collective_timeout() -> datetime.timedelta:
    """How long a collective operation may wait: the time that data preparation may take, at least.

    ``XTUNER_DATASET_TIMEOUT`` minutes, but never less than ``MIN_TIMEOUT``.
    """
    return datetime.timedelta(minutes=max(MIN_TIMEOUT, dataset_timeout()))
