"""Collective operations with a backward pass, over the ranks that share a row.

The loss of a step is the sum of what the ranks compute, so each backward pass here is the
derivative of that sum: what a rank gave to others comes back as their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def exchange(buffer: Tensor, given: list[int], taken: list[int], group: Any) -> Tensor:
    """Give a part of a buffer to each rank of a group, take one from each.

    Args:
        buffer: (sum of ``given``,) the parts in the order of the ranks.
        given: elements for each rank; 0 is allowed.
        taken: elements from each rank.
        group: the process group.

    Returns:
        (sum of ``taken``,) in the order of the ranks.
    """
    return _Exchange.apply(buffer, given, taken, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: Tensor, given: list[int], taken: list[int], group: Any) -> Tensor:
        ctx.settings = given, taken, group
        return _exchanged(buffer, given, taken, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        given, taken, group = ctx.settings
        return _exchanged(grads[0], taken, given, group), None, None, None


def _exchanged(buffer: Tensor, given: list[int], taken: list[int], group: Any) -> Tensor:
    result = buffer.new_empty(sum(taken))
    dist.all_to_all_single(result, buffer.contiguous(), taken, given, group=group)
    return result


def add_over_group(values: Tensor, group: Any) -> Tensor:
    """Add a tensor over the ranks of a group; every rank gets the sum.

    Args:
        values: of any shape, the same on all ranks.
        group: the process group.
    """
    return _Add.apply(values, group)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _added(values, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _added(grads[0], ctx.group), None


def _added(values: Tensor, group: Any) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_to_all(
    input: Tensor,
    process_group: Any,
    scatter_dim: int = 2,
    gather_dim: int = 1,
) -> Tensor:
    """Cut a tensor along one dimension for the ranks, join what they give along another.

    Args:
        input: for example (B, S/N, H, D); ``scatter_dim`` is divisible by the N ranks.
        process_group: the ranks; None leaves the tensor as it is.
        scatter_dim: the dimension that is cut.
        gather_dim: the dimension that grows.

    Returns:
        For example (B, S, H/N, D); differentiable.
    """
    if process_group is None:
        return input
    size = dist.get_world_size(process_group)
    parts = torch.stack(input.chunk(size, dim=scatter_dim))
    share = parts[0].numel()
    taken = exchange(parts.flatten(), [share] * size, [share] * size, process_group)
    return torch.cat(list(taken.view(parts.shape)), dim=gather_dim)


def split_for_sequence_parallel(
    input: Tensor,
    dim: int,
    sp_group: Any,
) -> Tensor:
    """This rank's part of a tensor that every rank has; its size along ``dim`` is divisible."""
    size = 1 if sp_group is None else dist.get_world_size(sp_group)
    if size == 1:
        return input
    if input.shape[dim] % size:
        raise ValueError(f"{input.shape[dim]} (dimension {dim}) cannot be cut in {size} parts")
    return input.chunk(size, dim=dim)[dist.get_rank(sp_group)].contiguous()


def gather_for_sequence_parallel(
    input: Tensor,
    dim: int,
    sp_group: Any,
) -> Tensor:
    """The parts of all ranks joined along ``dim``; they are of one shape. Not differentiable."""
    size = 1 if sp_group is None else dist.get_world_size(sp_group)
    if size == 1:
        return input
    parts = [torch.empty_like(input, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, input.detach().contiguous(), group=sp_group)
    return torch.cat(parts, dim=dim)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int, group: Any, factor: float) -> Tensor:
        ctx.settings = dim, group, factor
        return split_for_sequence_parallel(whole, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dim, group, factor = ctx.settings
        return gather_for_sequence_parallel(grads[0] * factor, dim, group), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, group: Any, factor: float) -> Tensor:
        ctx.settings = dim, group, factor
        return gather_for_sequence_parallel(part, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dim, group, factor = ctx.settings
        part = split_for_sequence_parallel(grads[0] * factor, dim, group)
        return part, None, None, None


def split_forward_gather_backward(
    input: Tensor,
    dim: int,
    sp_group: Any,
    grad_scale: str | None = None,
) -> Tensor:
    """Take this rank's part; backward joins the gradients of all parts.

    Args:
        input: the whole tensor, the same on every rank.
        dim: along which it is cut.
        sp_group: the ranks.
        grad_scale: ``up`` or ``down``: multiply or divide gradients by the number of ranks.
    """
    return _Split.apply(input, dim, sp_group, _factor(grad_scale, sp_group))


def gather_forward_split_backward(
    input: Tensor,
    dim: int,
    sp_group: Any,
    grad_scale: str | None = None,
) -> Tensor:
    """Join the parts of all ranks; backward takes this rank's part of its own gradient.

    It is the derivative where every rank computes the same of the whole.

    Args:
        input: this rank's part.
        dim: along which the parts are joined.
        sp_group: the ranks.
        grad_scale: ``up`` or ``down``: multiply or divide gradients by the number of ranks.
    """
    return _Gather.apply(input, dim, sp_group, _factor(grad_scale, sp_group))


def _factor(grad_scale: str | None, group: Any) -> float:
    size = 1 if group is None else dist.get_world_size(group)
    factors = {None: 1.0, "up": float(size), "down": 1.0 / size}
    if grad_scale not in factors:
        raise ValueError(f"grad_scale is None, 'up' or 'down', not {grad_scale!r}")
    return factors[grad_scale]
