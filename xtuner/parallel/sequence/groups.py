"""Which ranks share a row, and which read rows of their own.

Ranks that follow each other form a sequence group: with 8 processes and a size of 4 these are
0 1 2 3 and 4 5 6 7. The ranks in the same place of their groups form a data-parallel group: 0 4,
1 5, 2 6 and 3 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from mmengine.dist import get_dist_info

from xtuner.parallel.processes import init_distributed, timeout


@dataclass(frozen=True)
class _Layout:
    """The groups of this process; None where they would be of one rank or of all."""

    size: int = 1
    group: Any = None
    data_group: Any = None
    inner_size: int = 1
    inner_group: Any = None


_layout = _Layout()


def init_dist(
    launcher: str, backend: str = "nccl", init_backend: str = "torch", **kwargs: Any
) -> None:
    """Join the process group.

    Args:
        launcher: ``pytorch``, ``slurm`` or ``mpi``.
        backend: ``nccl`` or ``gloo``.
        init_backend: kept from v0.1: ``torch`` or ``deepspeed``, which uses torch's groups too.
        **kwargs: kept from v0.1.
    """
    init_distributed(launcher, backend)


def init_sequence_parallel(sequence_parallel_size: int = 1) -> None:
    """Say how many ranks share a row; called on every rank, after the processes have joined.

    Args:
        sequence_parallel_size: ranks of a group; it must divide the number of processes.

    Raises:
        ValueError: when it does not.
    """
    global _layout
    _, world_size = get_dist_info()
    if sequence_parallel_size < 1 or world_size % sequence_parallel_size:
        raise ValueError(
            f"sequence_parallel_size={sequence_parallel_size} does not divide the number of "
            f"processes, {world_size}"
        )
    size = sequence_parallel_size
    if size == 1:
        _layout = _Layout()
        return
    starts = range(0, world_size, size)
    _layout = _Layout(
        size=size,
        group=_own([list(range(start, start + size)) for start in starts]),
        data_group=_own([[start + place for start in starts] for place in range(size)]),
    )


def init_inner_sequence_parallel(inner_sequence_parallel_size: int = 1) -> None:
    """Divide the sequence groups into inner groups.

    v0.1 needed them where the heads cannot be dealt out evenly. Attention no longer does (see
    ``heads``); they are there for code of one's own.

    Args:
        inner_sequence_parallel_size: ranks of an inner group; it must divide those of a group.

    Raises:
        ValueError: when it does not.
    """
    global _layout
    size = inner_sequence_parallel_size
    if size < 1 or _layout.size % size:
        raise ValueError(
            f"inner_sequence_parallel_size={size} does not divide "
            f"sequence_parallel_size={_layout.size}"
        )
    _, world_size = get_dist_info()
    group = None
    if size > 1:
        group = _own([list(range(start, start + size)) for start in range(0, world_size, size)])
    _layout = _Layout(_layout.size, _layout.group, _layout.data_group, size, group)


def destroy_sequence_parallel() -> None:
    """Go back to one rank a row: the processes take leave of each other."""
    global _layout
    _layout = _Layout()


def _own(groups: list[list[int]]) -> Any:
    """Make process groups; give the one that this rank is in. Every rank must make all of them."""
    rank, _ = get_dist_info()
    own = None
    for ranks in groups:
        made = dist.new_group(ranks, timeout=timeout())
        own = made if rank in ranks else own
    return own


def get_sequence_parallel_group() -> Any:
    """The ranks that share this process's row; None where it has its own."""
    return _layout.group


def get_sequence_parallel_world_size() -> int:
    """Ranks that share a row."""
    return _layout.size


def get_sequence_parallel_rank() -> int:
    """This process's place among the ranks that share its row."""
    return get_dist_info()[0] % _layout.size


def is_inner_sequence_parallel_initialized() -> bool:
    """Whether there are inner groups."""
    return _layout.inner_group is not None


def get_inner_sequence_parallel_group() -> Any:
    """This process's inner group; None where there is none."""
    return _layout.inner_group


def get_inner_sequence_parallel_world_size() -> int:
    """Ranks of an inner group."""
    return _layout.inner_size


def get_inner_sequence_parallel_rank() -> int:
    """This process's place in its inner group."""
    return get_dist_info()[0] % _layout.inner_size


def get_data_parallel_group() -> Any:
    """The ranks in the same place of all sequence groups; None (torch: all) without such groups."""
    return _layout.data_group


def get_data_parallel_world_size() -> int:
    """Groups of ranks that read rows of their own."""
    return get_dist_info()[1] // _layout.size


def get_data_parallel_rank() -> int:
    """The number of this process's group."""
    return get_dist_info()[0] // _layout.size
