"""Cross-entropy on the supervised tokens alone, never with all logits at once.

The vocabulary projection and the softmax go over the supervised positions in chunks, and the
gradients of a chunk are made while its logits are there: the largest tensor is one chunk's logits,
whatever the length and the vocabulary.

Shapes: B batch, S tokens, N supervised tokens, H width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xtuner.utils.constants import IGNORE_INDEX

CHUNK_LOGITS = 2**24
"""Logits computed at once: 64 MiB of them in float32 ..."""
MIN_ROWS = 256
"""... but never fewer rows than this: narrow products leave most of a processor idle."""


def shift_labels(
    labels: Tensor, borders: Tensor | None = None, attention_mask: Tensor | None = None
) -> Tensor:
    """The token that each position must predict: the label of the next position.

    Args:
        labels: (B, S), ``IGNORE_INDEX`` where a token is not trained.
        borders: (samples + 1,) borders of a packed row (B is 1); the first token of a sample is
            never predicted from the sample before it.
        attention_mask: (B, S), 0 at padding, from which nothing is predicted.

    Returns:
        (B, S); ``IGNORE_INDEX`` at the last position of each row and of each packed sample.
    """
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    if borders is not None and len(borders) > 2:
        targets[:, borders[1:-1].long() - 1] = IGNORE_INDEX
    if attention_mask is not None:
        targets.masked_fill_(attention_mask == 0, IGNORE_INDEX)
    return targets


@dataclass(frozen=True)
class LogitRule:
    """What a model does to its logits after the projection: scale, then soft cap."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitRule:
        """Read the rule from a transformers config (Cohere, Granite and Gemma have one)."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@dataclass(frozen=True)
class LossTerms:
    """What a token's loss is made of beside its cross-entropy.

    Args:
        label_smoothing: the share of a target that is spread evenly over the vocabulary, as in
            ``torch.nn.functional.cross_entropy``.
        z_loss: weight of the squared log-sum-exp of the logits, which keeps them from drifting.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum over tokens, in plain torch.

        Args:
            logits: (N, V) in float32.
            targets: (N,).
        """
        total = nn.functional.cross_entropy(
            logits, targets, reduction="sum", label_smoothing=self.label_smoothing
        )
        if self.z_loss:
            total = total + self.z_loss * logits.logsumexp(-1).square().sum()
        return total


def linear_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    rule: LogitRule | None = None,
    terms: LossTerms | None = None,
) -> Tensor:
    """Sum of the cross-entropies of the supervised tokens.

    Args:
        hidden: (N, H) last hidden states at the supervised positions.
        head: the output layer; a plain ``nn.Linear`` takes the fast path, others (an adapter on the
            head) are computed twice, chunk by chunk.
        targets: (N,) token ids.
        rule: what is done to the logits.
        terms: what the loss is made of beside the cross-entropy.

    Returns:
        A float32 scalar; 0, connected to ``hidden``, when there is no token.
    """
    rule, terms = rule or LogitRule(), terms or LossTerms()
    # Without a token all is done the same with no rows: every weight gets a gradient, if of zeros,
    # and other processes that wait for it, or hold a part of the weights, are met.
    if type(head) is nn.Linear and head.bias is None and rule == LogitRule():
        dtype = _compute_dtype(hidden)
        return _FusedCrossEntropy.apply(hidden, head.weight, targets, dtype, terms)
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, goal in _chunks(hidden, head, targets):
        total = total + checkpoint(_chunk_loss, part, head, goal, rule, terms, use_reentrant=False)
    return total


def token_log_probs(
    hidden: Tensor, head: nn.Module, targets: Tensor, rule: LogitRule | None = None
) -> Tensor:
    """Log-probability of each target, in chunks.

    Args:
        hidden: (N, H) last hidden states.
        head: the output layer.
        targets: (N,) token ids.
        rule: what is done to the logits.

    Returns:
        (N,) in float32, differentiable.
    """
    rule = rule or LogitRule()
    parts = [
        checkpoint(_chunk_log_probs, part, head, goal, rule, use_reentrant=False)
        for part, goal in _chunks(hidden, head, targets)
    ]
    return torch.cat(parts)


def _chunks(hidden: Tensor, head: nn.Module, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows and their targets, for one call of the head each; at least one, if of no rows.

    Where the processes put the head's weights together at each call (ZeRO-3) they must call it
    equally often, whatever the number of their tokens.
    """
    size = _chunk_size(_vocabulary(head))
    chunks = list(zip(hidden.split(size), targets.split(size), strict=True))
    if any(hasattr(weight, "ds_id") for weight in head.parameters()):
        most = torch.tensor(len(chunks), device=hidden.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        chunks += [(hidden[:0], targets[:0])] * (int(most) - len(chunks))
    return chunks


def _chunk_log_probs(hidden: Tensor, head: nn.Module, targets: Tensor, rule: LogitRule) -> Tensor:
    logits = rule(head(hidden).float())
    return -nn.functional.cross_entropy(logits, targets, reduction="none")


def _chunk_loss(
    hidden: Tensor, head: nn.Module, targets: Tensor, rule: LogitRule, terms: LossTerms
) -> Tensor:
    return terms(rule(head(hidden).float()), targets)


def _chunk_size(vocabulary: int) -> int:
    return max(MIN_ROWS, CHUNK_LOGITS // vocabulary)


def _vocabulary(head: nn.Module) -> int:
    return int(getattr(head, "out_features", None) or next(head.parameters()).shape[0])


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


class _FusedCrossEntropy(torch.autograd.Function):
    """Projection and cross-entropy whose gradients are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        terms: LossTerms,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        matrix = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None
        total = hidden.new_zeros((), dtype=torch.float32)
        size = _chunk_size(weight.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(targets), size):
                part = hidden[start : start + size].to(dtype)
                logits = part @ matrix.T
                goal = targets[start : start + size, None]
                log_probs = logits.log_softmax(-1, dtype=torch.float32)
                norm = logits.gather(1, goal).float() - log_probs.gather(1, goal)
                total += _sum_of(log_probs, norm, goal, terms)
                if not (need_hidden or need_weight):
                    continue
                slope = _slope_of(log_probs, norm, goal, terms).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + size] = (slope @ matrix).to(hidden.dtype)
                if need_weight and grad_weight is None:  # most often there is one chunk
                    grad_weight = (slope.T @ part).float()
                elif grad_weight is not None:
                    grad_weight += slope.T @ part
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        elif need_weight:  # there is no token; other processes wait for this gradient
            grad_weight = torch.zeros_like(weight)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (slope,) = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place, as a second weight of a large vocabulary is much memory; autograd itself refuses
        # a second backward pass over tensors that were changed.
        for grad in (grad_hidden, grad_weight):
            if grad is not None:
                grad.mul_(slope.to(grad.dtype))
        return grad_hidden, grad_weight, None, None, None


def _sum_of(log_probs: Tensor, norm: Tensor, goal: Tensor, terms: LossTerms) -> Tensor:
    """The loss of a chunk: ``log_probs`` (n, V), log-sum-exps ``norm`` and ``goal`` (n, 1)."""
    share = terms.label_smoothing
    total = log_probs.gather(1, goal).sum() * (share - 1)
    if share:
        total -= share * log_probs.mean(-1).sum()
    return total + terms.z_loss * norm.square().sum() if terms.z_loss else total


def _slope_of(log_probs: Tensor, norm: Tensor, goal: Tensor, terms: LossTerms) -> Tensor:
    """The gradient with respect to the logits, (n, V), in their memory: softmax minus target."""
    share = terms.label_smoothing
    slope = log_probs.exp_()
    if terms.z_loss:
        slope.mul_(1 + 2 * terms.z_loss * norm)
    if share:
        slope.sub_(share / slope.shape[1])
    return slope.scatter_add_(1, goal, slope.new_full(goal.shape, share - 1))
