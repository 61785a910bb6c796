"""The process groups of sequence and data parallelism.

Consecutive ranks form a sequence-parallel group, which shares each row: with 8 processes and a
size of 4 these are 0 1 2 3 and 4 5 6 7. The ranks at the same position of their groups form a
data-parallel group: 0 4, 1 5, 2 6 and 3 7.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from mmengine.dist import get_dist_info
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class _Layout:
    """The groups of this process; None where they would be of one rank or of all."""

    size: int = 1
    group: ProcessGroup | None = None
    data_group: ProcessGroup | None = None
    inner_size: int = 1
    inner_group: ProcessGroup | None = None


_layout = _Layout()


def init_dist(
    launcher: str, backend: str = "nccl", init_backend: str = "torch", **kwargs: object
) -> None:
    """Initialize the process group.

    Args:
        launcher: ``pytorch``, ``slurm`` or ``mpi``.
        backend: ``nccl`` or ``gloo``.
        init_backend: kept from v0.1: ``torch`` or ``deepspeed``, which uses torch's groups too.
        **kwargs: kept from v0.1.
    """
    from xtuner.parallel.processes import init_distributed

    init_distributed(launcher, backend)


def init_sequence_parallel(sequence_parallel_size: int = 1) -> None:
    """Create the sequence- and data-parallel groups.

    Called on every rank, after the process group is initialized.

    Args:
        sequence_parallel_size: ranks that share a row; it must divide the world size.

    Raises:
        ValueError: when it does not.
    """
    from xtuner.parallel.processes import on_shutdown

    global _layout
    on_shutdown(destroy_sequence_parallel)
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
    """Divide the sequence-parallel groups into inner groups.

    v0.1 needed them where the number of heads is not divisible by the group's size. Attention no
    longer does (see ``heads``); they remain for users' own code.

    Args:
        inner_sequence_parallel_size: ranks of an inner group; it must divide the size of a group.

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
    """Drop the groups: each rank has rows of its own again."""
    global _layout
    _layout = _Layout()


def _own(groups: list[list[int]]) -> ProcessGroup | None:
    """Create process groups and return this rank's. Every rank must create all of them."""
    from xtuner.parallel.launch_env import collective_timeout

    rank, _ = get_dist_info()
    own = None
    for ranks in groups:
        group = dist.new_group(ranks, timeout=collective_timeout())
        own = group if rank in ranks else own
    return own


def get_sequence_parallel_group() -> ProcessGroup | None:
    """The ranks that share this process's rows; None without sequence parallelism."""
    return _layout.group


def get_sequence_parallel_world_size() -> int:
    """Ranks that share a row."""
    return _layout.size


def get_sequence_parallel_rank() -> int:
    """This process's rank in its sequence-parallel group."""
    return get_dist_info()[0] % _layout.size


def is_inner_sequence_parallel_initialized() -> bool:
    """Whether there are inner groups."""
    return _layout.inner_group is not None


def get_inner_sequence_parallel_group() -> ProcessGroup | None:
    """This process's inner group; None where there is none."""
    return _layout.inner_group


def get_inner_sequence_parallel_world_size() -> int:
    """Ranks of an inner group."""
    return _layout.inner_size


def get_inner_sequence_parallel_rank() -> int:
    """This process's rank in its inner group."""
    return get_dist_info()[0] % _layout.inner_size


def get_data_parallel_group() -> ProcessGroup | None:
    """This process's data-parallel group; None, which torch takes for all ranks, by default."""
    return _layout.data_group


def get_data_parallel_world_size() -> int:
    """The number of sequence-parallel groups, each of which reads its own rows."""
    return get_dist_info()[1] // _layout.size


def get_data_parallel_rank() -> int:
    """The index of this process's sequence-parallel group."""
    return get_dist_info()[0] // _layout.size
