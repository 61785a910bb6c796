"""Cross-entropy of the supervised tokens, never with all logits at once.

A plain head is computed in blocks of the vocabulary (see ``backends.cross_entropy``). Other heads
(an adapter, a bias) are called for chunks of the positions.

Shapes: B batch, S tokens, N supervised tokens, H width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xtuner.model.backends.case import Case
from xtuner.model.backends.cpu import cross_entropy as cpu
from xtuner.model.backends.cross_entropy import (
    BlockSizes,
    FusedCrossEntropy,
    LogitTransform,
    LossConfig,
)
from xtuner.model.backends.gpu import cross_entropy as gpu
from xtuner.model.backends.registry import Backend, choose
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.lang import tr

__all__ = [
    "LogitTransform",
    "LossConfig",
    "linear_cross_entropy",
    "shift_labels",
    "supervised_positions",
    "token_log_probs",
]

CHUNK_LOGITS, MIN_ROWS = 2**24, 256
"""Logits of a chunk of positions, and the fewest positions, where the head is called for chunks."""
SumOfLosses: TypeAlias = Callable[[Tensor, nn.Module, Tensor, LogitTransform, LossConfig], Tensor]
"""The sum of the losses of (N, H) hidden states, by their head and (N,) targets."""


def shift_labels(
    labels: Tensor, cu_seqlens: Tensor | None = None, attention_mask: Tensor | None = None
) -> Tensor:
    """The token that each position must predict: the label of the next position.

    Args:
        labels: (B, S), ``IGNORE_INDEX`` where a token is not trained.
        cu_seqlens: (samples + 1,) cumulative lengths of a packed row (B is 1); the first token of a
            sample is never predicted from the sample before it.
        attention_mask: (B, S), 0 at padding, from which nothing is predicted.

    Returns:
        (B, S); ``IGNORE_INDEX`` at the last position of each row and of each packed sample.
    """
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    if cu_seqlens is not None and len(cu_seqlens) > 2:
        targets[:, cu_seqlens[1:-1].long() - 1] = IGNORE_INDEX
    if attention_mask is not None:
        targets.masked_fill_(attention_mask == 0, IGNORE_INDEX)
    return targets


def supervised_positions(targets: Tensor) -> Tensor:
    """Where there is a loss, and what is predicted there.

    Args:
        targets: (B, S) as ``shift_labels`` makes them.

    Returns:
        (2, N) positions in the flattened rows, and token ids.
    """
    targets = targets.flatten()
    positions = (targets != IGNORE_INDEX).nonzero().flatten()
    return torch.stack([positions, targets[positions]])


def linear_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    transform: LogitTransform | None = None,
    config: LossConfig | None = None,
) -> Tensor:
    """Sum of the losses of the supervised tokens.

    Args:
        hidden: (N, H) last hidden states at the supervised positions.
        head: the output layer; one that only multiplies by a matrix takes the fast path, others (a
            bias, an adapter) are computed twice, chunk by chunk.
        targets: (N,) token ids.
        transform: what is done to the logits.
        config: terms of the loss beside the cross-entropy.

    Returns:
        A float32 scalar; 0, connected to ``hidden``, when there is no token.
    """
    sum_of_losses = loss_kernel(hidden.device.type, is_plain_head(head))
    transform, config = transform or LogitTransform(), config or LossConfig()
    # Without a token all is done the same with no rows: every weight gets a gradient, if of zeros,
    # and other processes that wait for it, or hold a part of the weights, are met.
    return sum_of_losses(hidden, head, targets, transform, config)


def is_plain_head(head: nn.Module | None) -> bool:
    """Whether an output layer only multiplies by a matrix (see ``_projection``)."""
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return False
    return type(head) is nn.Linear or hasattr(head, "projection")


def _projection(head: Any) -> Tensor:
    """(V, H) what a plain head multiplies by.

    It is the weight of an ``nn.Linear``, or what ``projection()`` of a class derived from it makes
    of the weight (Baichuan2 normalises the rows).
    """
    projection: Tensor = head.weight if type(head) is nn.Linear else head.projection()
    return projection


def _fused(sizes: BlockSizes) -> SumOfLosses:
    def sum_of_losses(
        hidden: Tensor,
        head: nn.Module,
        targets: Tensor,
        transform: LogitTransform,
        config: LossConfig,
    ) -> Tensor:
        dtype, weight = _compute_dtype(hidden), _projection(head)
        total: Tensor = FusedCrossEntropy.apply(
            hidden, weight, targets, dtype, transform, config, sizes
        )
        return total

    return sum_of_losses


def _in_chunks(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    transform: LogitTransform,
    config: LossConfig,
) -> Tensor:
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, goal in _chunks(hidden, head, targets):
        loss = checkpoint(_chunk_loss, part, head, goal, transform, config, use_reentrant=False)
        total = total + loss
    return total


def _unsupported_by_fused(case: Case) -> str | None:
    if not case.separate_head:
        return tr("the model computes its logits by code of its own")
    return None if case.plain_head else tr("the output layer has a bias or an adapter")


def _unsupported_in_chunks(case: Case) -> str | None:
    return None if case.separate_head else tr("the model computes its logits by code of its own")


FUSED = "fused linear cross-entropy"
LOSS_BACKENDS: tuple[Backend[SumOfLosses], ...] = (
    Backend(FUSED, _unsupported_by_fused, lambda case: _fused(cpu.SIZES), device="cpu"),
    Backend(FUSED, _unsupported_by_fused, lambda case: _fused(gpu.SIZES)),
    Backend("cross-entropy in chunks", _unsupported_in_chunks, lambda case: _in_chunks),
    # by ``SupervisedFinetune`` and ``PreferenceModel``
    Backend("cross-entropy of all logits", lambda case: None, lambda case: _in_chunks),
)
"""For the loss of supervised tokens, the best first."""


@functools.cache
def loss_kernel(device: str, plain_head: bool) -> SumOfLosses:
    """What computes the loss, chosen once for each kind of head."""
    return choose(LOSS_BACKENDS, Case(device, plain_head=plain_head)).build()


def token_log_probs(
    hidden: Tensor, head: nn.Module, targets: Tensor, transform: LogitTransform | None = None
) -> Tensor:
    """Log-probability of each target, in chunks.

    Args:
        hidden: (N, H) last hidden states.
        head: the output layer.
        targets: (N,) token ids.
        transform: what is done to the logits.

    Returns:
        (N,) in float32, differentiable.
    """
    transform = transform or LogitTransform()
    parts = [
        checkpoint(_chunk_log_probs, part, head, goal, transform, use_reentrant=False)
        for part, goal in _chunks(hidden, head, targets)
    ]
    return torch.cat(parts)


def _chunks(hidden: Tensor, head: nn.Module, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows and their targets, for one call of the head each; at least one, if of no rows.

    Where the processes gather the head's weights at each call (ZeRO-3) they must call it equally
    often, whatever the number of their tokens.
    """
    size = _chunk_size(_vocabulary(head))
    chunks = list(zip(hidden.split(size), targets.split(size), strict=True))
    if any(hasattr(weight, "ds_id") for weight in head.parameters()):
        most = torch.tensor(len(chunks), device=hidden.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        chunks += [(hidden[:0], targets[:0])] * (int(most) - len(chunks))
    return chunks


def _chunk_log_probs(
    hidden: Tensor, head: nn.Module, targets: Tensor, transform: LogitTransform
) -> Tensor:
    logits = transform(head(hidden).float())
    return -nn.functional.cross_entropy(logits, targets, reduction="none")


def _chunk_loss(
    hidden: Tensor, head: nn.Module, targets: Tensor, transform: LogitTransform, config: LossConfig
) -> Tensor:
    return config(transform(head(hidden).float()), targets)


def _chunk_size(vocabulary: int) -> int:
    return max(MIN_ROWS, CHUNK_LOGITS // vocabulary)


def _vocabulary(head: nn.Module) -> int:
    return int(getattr(head, "out_features", None) or next(head.parameters()).shape[0])


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype
