"""The mean loss of rows whose tokens are sharded over ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from xtuner.parallel.sequence.collectives import all_reduce_sum
from xtuner.parallel.sequence.groups import get_sequence_parallel_group


def reduce_sequence_parallel_loss(
    mean_loss: Tensor, loss_scale: Tensor | float, sp_group: ProcessGroup | None = None
) -> Tensor:
    """The mean loss of a group's tokens, from the means of its ranks.

    Args:
        mean_loss: scalar, the mean over this rank's tokens; ignored where it has none.
        loss_scale: the number of tokens (or the weight) of this mean.
        sp_group: the group; that of ``init_sequence_parallel`` when None.

    Returns:
        The scalar on every rank. Backward, each rank gets the derivative of the sum of all ranks'
        results, so averaged over the ranks (as DistributedDataParallel does) gradients are those of
        the mean.
    """
    group = get_sequence_parallel_group() if sp_group is None else sp_group
    scale = torch.as_tensor(loss_scale, dtype=mean_loss.dtype, device=mean_loss.device).detach()
    weighted = torch.where(scale > 0, mean_loss, torch.zeros_like(mean_loss)) * scale
    if group is None:
        return weighted / scale.clamp(min=1e-12)
    total = all_reduce_sum(scale, group)
    return all_reduce_sum(weighted, group) / total.clamp(min=1e-12)
