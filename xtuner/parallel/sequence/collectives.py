"""Differentiable collectives over the ranks of a sequence-parallel group.

The loss of a step is the sum of what the ranks compute, so each backward pass here is the
derivative of that sum: a rank gets the gradients of what it sent to others from them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from xtuner.utils.types import AutogradContext


def all_to_all_single(
    buffer: Tensor, send_sizes: list[int], receive_sizes: list[int], group: ProcessGroup
) -> Tensor:
    """``torch.distributed.all_to_all_single`` with a backward pass.

    Args:
        buffer: (sum of ``send_sizes``,) the parts in the order of the ranks.
        send_sizes: elements for each rank; 0 is allowed.
        receive_sizes: elements from each rank.
        group: the process group.

    Returns:
        (sum of ``receive_sizes``,) in the order of the ranks.
    """
    return _AllToAll.apply(buffer, send_sizes, receive_sizes, group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext,
        buffer: Tensor,
        send_sizes: list[int],
        receive_sizes: list[int],
        group: ProcessGroup,
    ) -> Tensor:
        ctx.settings = send_sizes, receive_sizes, group
        return _exchange(buffer, send_sizes, receive_sizes, group)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        send_sizes, receive_sizes, group = ctx.settings
        return _exchange(grads[0], receive_sizes, send_sizes, group), None, None, None


def _exchange(
    buffer: Tensor, send_sizes: list[int], receive_sizes: list[int], group: ProcessGroup
) -> Tensor:
    received = buffer.new_empty(sum(receive_sizes))
    dist.all_to_all_single(received, buffer.contiguous(), receive_sizes, send_sizes, group=group)
    return received


def all_reduce_sum(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum a tensor over the ranks of a group, forward and backward; every rank gets the sum.

    Args:
        values: of any shape, the same on all ranks.
        group: the process group; None for all ranks.
    """
    return _AllReduceSum.apply(values, group)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, values: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _summed(values, group)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.group), None


def _summed(values: Tensor, group: ProcessGroup | None) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_to_all(
    input: Tensor,
    process_group: ProcessGroup | None,
    scatter_dim: int = 2,
    gather_dim: int = 1,
) -> Tensor:
    """Split a tensor over the ranks along one dimension, gather theirs along another.

    Args:
        input: for example (B, S/N, H, D); ``scatter_dim`` is divisible by the N ranks.
        process_group: the group; None returns the tensor unchanged.
        scatter_dim: the dimension that is split.
        gather_dim: the dimension that is concatenated.

    Returns:
        For example (B, S, H/N, D); differentiable.
    """
    if process_group is None:
        return input
    size = dist.get_world_size(process_group)
    parts = torch.stack(input.chunk(size, dim=scatter_dim))
    sizes = [parts[0].numel()] * size
    received = all_to_all_single(parts.flatten(), sizes, sizes, process_group)
    return torch.cat(list(received.view(parts.shape)), dim=gather_dim)


def split_for_sequence_parallel(
    input: Tensor,
    dim: int,
    sp_group: ProcessGroup | None,
) -> Tensor:
    """This rank's shard of a tensor that every rank has.

    Raises:
        ValueError: when the size along ``dim`` is not divisible by the number of ranks.
    """
    size = 1 if sp_group is None else dist.get_world_size(sp_group)
    if size == 1:
        return input
    if input.shape[dim] % size:
        raise ValueError(f"{input.shape[dim]} (dimension {dim}) cannot be split into {size} shards")
    return input.chunk(size, dim=dim)[dist.get_rank(sp_group)].contiguous()


def gather_for_sequence_parallel(
    input: Tensor,
    dim: int,
    sp_group: ProcessGroup | None,
) -> Tensor:
    """The shards of all ranks, of equal shape, concatenated along ``dim``. Not differentiable."""
    size = 1 if sp_group is None else dist.get_world_size(sp_group)
    if size == 1:
        return input
    parts = [torch.empty_like(input, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, input.detach().contiguous(), group=sp_group)
    return torch.cat(parts, dim=dim)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext, full: Tensor, dim: int, group: ProcessGroup | None, factor: float
    ) -> Tensor:
        ctx.settings = dim, group, factor
        return split_for_sequence_parallel(full, dim, group)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        dim, group, factor = ctx.settings
        return gather_for_sequence_parallel(grads[0] * factor, dim, group), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext, shard: Tensor, dim: int, group: ProcessGroup | None, factor: float
    ) -> Tensor:
        ctx.settings = dim, group, factor
        return gather_for_sequence_parallel(shard, dim, group)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        dim, group, factor = ctx.settings
        return split_for_sequence_parallel(grads[0] * factor, dim, group), None, None, None


def split_forward_gather_backward(
    input: Tensor,
    dim: int,
    sp_group: ProcessGroup | None,
    grad_scale: str | None = None,
) -> Tensor:
    """Take this rank's shard; backward gathers the gradients of all shards.

    Args:
        input: the full tensor, the same on every rank.
        dim: along which it is split.
        sp_group: the group.
        grad_scale: ``up`` or ``down``: multiply or divide gradients by the number of ranks.
    """
    return _Split.apply(input, dim, sp_group, _factor(grad_scale, sp_group))


def gather_forward_split_backward(
    input: Tensor,
    dim: int,
    sp_group: ProcessGroup | None,
    grad_scale: str | None = None,
) -> Tensor:
    """Gather the shards of all ranks; backward takes this rank's shard of its own gradient.

    That is the derivative where every rank computes the same function of the full tensor.

    Args:
        input: this rank's shard.
        dim: along which the shards are concatenated.
        sp_group: the group.
        grad_scale: ``up`` or ``down``: multiply or divide gradients by the number of ranks.
    """
    return _Gather.apply(input, dim, sp_group, _factor(grad_scale, sp_group))


def _factor(grad_scale: str | None, group: ProcessGroup | None) -> float:
    size = 1 if group is None else dist.get_world_size(group)
    factors = {None: 1.0, "up": float(size), "down": 1.0 / size}
    if grad_scale not in factors:
        raise ValueError(f"grad_scale is None, 'up' or 'down', not {grad_scale!r}")
    return factors[grad_scale]
