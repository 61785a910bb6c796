"""Processes that work together in a test: started once, they go through many cases."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def together(work: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """Call ``work`` in ``size`` processes of one gloo group; give what each returned."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_one, (size, folder, work, arguments), nprocs=size, start_method="fork")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _one(rank: int, size: int, folder: str, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        torch.save(work(*arguments), Path(folder) / f"{rank}.pt")
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the others wait for this one
    dist.destroy_process_group()
