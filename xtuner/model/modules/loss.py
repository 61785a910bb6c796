"""The loss of a language model: which tokens count, and cross-entropy without all the logits.

Logits are formed for supervised positions only, and a chunk of them at a time. ``chunked_log_probs``
gives the log-probability of each token in the same way, for losses on preferences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from xtuner.model.modules.head import Head
from xtuner.utils.constants import IGNORE_INDEX

# Logits that are held at once, as a number of elements. A larger chunk adds to the head's gradient
# less often, which matters with large vocabularies; a smaller one stays in the processor's cache.
LOGITS_AT_ONCE = {"cpu": 2**25, "cuda": 2**28}
FEWEST_ROWS = 512


def shift_labels(labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Give each position the label of the next token.

    Args:
        labels: ``(B, S)``, ``IGNORE_INDEX`` where nothing is trained.
        cu_seqlens: borders of the samples in a packed row, ``(num_samples + 1,)``, from 0 to S
            (B = 1). The first token of a sample is not predicted from the sample before it.

    Returns:
        ``(B, S)``; the last position of each row and of each sample is ``IGNORE_INDEX``.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if cu_seqlens is not None and len(cu_seqlens) > 2:
        shifted[:, cu_seqlens[1:-1].long() - 1] = IGNORE_INDEX
    return shifted


def cross_entropy_sum(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum the cross-entropy over the supervised positions.

    Args:
        hidden: ``(B, S, H)`` or ``(N, H)``, the body's output.
        labels: ``(B, S)`` or ``(N,)``, already shifted.
        head: what makes logits of hidden states.
        label_smoothing: share of the target spread evenly over the vocabulary.
        z_loss: weight of the squared log-normaliser, which keeps logits small.

    Returns:
        A float32 scalar; 0, still part of the graph, when nothing is supervised.
    """
    rows, targets = _supervised(hidden, labels)
    weight = head.weight
    if weight is not None:
        settings = (head.scale, head.softcap, label_smoothing, z_loss, torch.is_grad_enabled())
        return _LinearCrossEntropy.apply(rows, weight, head.bias, targets, *settings)
    total = rows.new_zeros((), dtype=torch.float32)
    for part in _chunks(len(rows), head.vocab_size, rows.device):
        total = total + checkpoint(
            _chunk_loss, rows[part], targets[part], head, label_smoothing, z_loss,
            use_reentrant=False,
        )  # fmt: skip
    return total


def chunked_log_probs(hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
    """The log-probability of each label.

    Args:
        hidden: ``(B, S, H)``, the body's output.
        labels: ``(B, S)``, already shifted.
        head: what makes logits of hidden states.

    Returns:
        ``(B, S)`` in float32, 0 where the label is ``IGNORE_INDEX``.
    """
    at = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    rows, targets = hidden[at], labels[at]
    found = [
        checkpoint(_chunk_log_probs, rows[part], targets[part], head, use_reentrant=False)
        for part in _chunks(len(rows), head.vocab_size, rows.device)
    ]
    values = torch.cat(found) if found else rows.sum(-1).float()
    return torch.zeros(labels.shape, device=hidden.device).index_put(at, values)


def _supervised(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and labels of the supervised positions.

    When there are none, one row without a label stays, so that every parameter gets a gradient
    (of zero), which processes that exchange gradients rely on.
    """
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    at = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    if not len(at):
        return hidden[:1], labels[:1]
    if len(at) == len(labels):
        return hidden, labels
    return hidden[at], labels[at]


def _chunks(rows: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    at_once = LOGITS_AT_ONCE.get(device.type, 2**28)
    size = max(FEWEST_ROWS, at_once // vocab_size)
    for begin in range(0, rows, size):
        yield slice(begin, begin + size)


def _chunk_loss(
    rows: Tensor, targets: Tensor, head: Head, label_smoothing: float, z_loss: float
) -> Tensor:
    logits = head(rows).float()
    loss = F.cross_entropy(
        logits,
        targets,
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    if z_loss:
        counted = (targets != IGNORE_INDEX).float()
        loss = loss + z_loss * (logits.logsumexp(-1).square() * counted).sum()
    return loss


def _chunk_log_probs(rows: Tensor, targets: Tensor, head: Head) -> Tensor:
    logits = head(rows).float()
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear head, summed, with its gradients found on the way forward.

    The gradient of a sum is known up to one factor, so each chunk's logits are formed once: three
    matrix products instead of the four that recomputing them in the backward takes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        label_smoothing: float,
        z_loss: float,
        with_grad: bool,
    ) -> Tensor:
        dtype = compute_dtype(weight)
        with torch.autocast(rows.device.type, enabled=False):
            matrix, inputs = weight.to(dtype), rows.to(dtype)
            wanted = [with_grad and needed for needed in ctx.needs_input_grad[:3]]
            grad_rows = torch.empty_like(inputs) if wanted[0] else None
            grad_weight = _zeros(weight) if wanted[1] else None
            grad_bias = _zeros(bias) if wanted[2] and bias is not None else None
            total = rows.new_zeros((), dtype=torch.float32)
            for part in _chunks(len(rows), len(weight), rows.device):
                x = inputs[part]
                logits = F.linear(x, matrix, None if bias is None else bias.to(dtype))
                loss, grad = _loss_and_grad(
                    logits, targets[part], scale, softcap, label_smoothing, z_loss, any(wanted)
                )
                total += loss
                if grad is None:
                    continue
                grad = grad.to(dtype)
                if grad_rows is not None:
                    torch.mm(grad, matrix, out=grad_rows[part])
                if grad_weight is not None:
                    grad_weight += grad.t() @ x
                if grad_bias is not None:
                    grad_bias += grad.sum(0, dtype=torch.float32)
        ctx.grads = (grad_rows, grad_weight, grad_bias)
        ctx.dtypes = (rows.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            None if grad is None else grad.mul_(outputs[0]).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        ctx.grads = (None, None, None)  # each may be large: hand it over
        return (*grads, None, None, None, None, None, None)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """What matrix products with ``weight`` run in: autocast's dtype, or the weight's own."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.float32)


def _loss_and_grad(
    logits: Tensor,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The summed loss of a chunk, and its gradient by what the head's matrix gave.

    Args:
        logits: ``(n, V)``, before scale and soft cap.
        targets: ``(n,)``.
        scale: factor on the logits.
        softcap: bound that the logits are bent towards, or None.
        label_smoothing: share of the target that is spread evenly.
        z_loss: weight of the squared log-normaliser.
        with_grad: whether the gradient is wanted.
    """
    raw = logits.float()
    values = raw if scale == 1.0 else raw.mul_(scale)
    bent = None
    if softcap is not None:
        bent = torch.tanh(values / softcap)
        values = bent * softcap
    counted = targets != IGNORE_INDEX
    at = torch.where(counted, targets, 0).unsqueeze(-1)
    log_probs = torch.log_softmax(values, -1)
    mine = log_probs.gather(-1, at).squeeze(-1)
    share = label_smoothing / values.shape[-1]
    each = -(1.0 - label_smoothing) * mine
    if label_smoothing:
        each = each - share * log_probs.sum(-1)
    normaliser = None
    if z_loss:
        normaliser = values[:, 0] - log_probs[:, 0]  # log of the sum of exponentials
        each = each + z_loss * normaliser.square()
    loss = torch.where(counted, each, 0.0).sum()
    if not with_grad:
        return loss, None
    grad = log_probs.exp_()
    if normaliser is not None:
        grad.mul_((1.0 + 2.0 * z_loss * normaliser).unsqueeze(-1))
    if label_smoothing:
        grad.sub_(share)
    grad.scatter_add_(-1, at, torch.full_like(at, label_smoothing - 1.0, dtype=grad.dtype))
    if bent is not None:
        grad.mul_(1.0 - bent.square_())
    grad.mul_(counted.unsqueeze(-1) * scale)
    return loss, grad
