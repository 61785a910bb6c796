"""Cross-entropy on the supervised tokens alone, never with all logits at once.

A plain head and the softmax go over the vocabulary in blocks, and the gradients are made in the
same forward pass: the largest tensor is the gradient of the head, whatever the length and the
vocabulary. Other heads (an adapter, a bias) are called for chunks of the positions.

Shapes: B batch, S tokens, N supervised tokens, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xtuner.parallel.sequence.padding import padded
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.cpu import pad_to_bucket

BLOCK_LOGITS = 2**23
"""Logits of a block of the vocabulary: 16 MiB of them in bfloat16 ..."""
MIN_COLUMNS = 512
"""... but never fewer columns than this: narrow products leave most of a processor idle."""
KEPT_LOGITS = 2**25
"""No more than these are kept for the second pass; computing them again is cheaper than memory."""
CACHED_LOGITS = 2**18
"""Logits that a CPU turns at once into what is made of them: 1 MiB in float32."""
CHUNK_LOGITS, MIN_ROWS = 2**24, 256
"""The same for heads that are no plain layer, which are called for rows, not for columns."""


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
class LogitTransform:
    """What a model does to its logits after the projection: scale, then soft cap."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """Read the rule from a transformers config (Cohere, Granite and Gemma have one)."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def slope(self, logits: Tensor) -> Tensor | float | None:
        """How much the logits that the rule gave move with those it got; None: just as much."""
        if self.cap is None:
            return None if self.scale == 1.0 else self.scale
        return (1 - (logits / self.cap).square()).mul_(self.scale)


@dataclass(frozen=True)
class LossConfig:
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
    rule: LogitTransform | None = None,
    terms: LossConfig | None = None,
) -> Tensor:
    """Sum of the cross-entropies of the supervised tokens.

    Args:
        hidden: (N, H) last hidden states at the supervised positions.
        head: the output layer; one that only multiplies by a matrix takes the fast path, others (a
            bias, an adapter on the head) are computed twice, chunk by chunk.
        targets: (N,) token ids.
        rule: what is done to the logits.
        terms: what the loss is made of beside the cross-entropy.

    Returns:
        A float32 scalar; 0, connected to ``hidden``, when there is no token.
    """
    rule, terms = rule or LogitTransform(), terms or LossConfig()
    # Without a token all is done the same with no rows: every weight gets a gradient, if of zeros,
    # and other processes that wait for it, or hold a part of the weights, are met.
    weight = _projection(head)
    if weight is not None:
        dtype = _compute_dtype(hidden)
        return _FusedCrossEntropy.apply(hidden, weight, targets, dtype, rule, terms)
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, goal in _chunks(hidden, head, targets):
        total = total + checkpoint(_chunk_loss, part, head, goal, rule, terms, use_reentrant=False)
    return total


def _projection(head: nn.Module) -> Tensor | None:
    """(V, H) what a head multiplies by, if that is all it does.

    It is the weight of an ``nn.Linear``, or what ``projection()`` of a class derived from it makes
    of the weight (Baichuan2 normalises the rows).
    """
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return None
    if type(head) is nn.Linear:
        return head.weight
    return head.projection() if hasattr(head, "projection") else None


def token_log_probs(
    hidden: Tensor, head: nn.Module, targets: Tensor, rule: LogitTransform | None = None
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
    rule = rule or LogitTransform()
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


def _chunk_log_probs(
    hidden: Tensor, head: nn.Module, targets: Tensor, rule: LogitTransform
) -> Tensor:
    logits = rule(head(hidden).float())
    return -nn.functional.cross_entropy(logits, targets, reduction="none")


def _chunk_loss(
    hidden: Tensor, head: nn.Module, targets: Tensor, rule: LogitTransform, terms: LossConfig
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
    """Projection and cross-entropy over the vocabulary in blocks; the forward makes the gradients.

    A first pass finds the log-sum-exp of each row, a second turns the logits into their gradients,
    in place, and these into those of the weight, block by block: each part of a gradient is written
    once. Few logits are kept from the first pass to the second, many are computed again: that is
    one product in four, and a large vocabulary then costs no memory but its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        rule: LogitTransform,
        terms: LossConfig,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        with torch.autocast(hidden.device.type, enabled=False):
            logits = _Logits(hidden.to(dtype), weight, targets, rule)
            total = logits.total(terms)
            grad_hidden = grad_weight = None
            if need_hidden:
                grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
            if need_weight:  # zeros where there is no token: other processes wait for it
                grad_weight = torch.empty_like(weight)
            for block in logits.blocks if need_hidden or need_weight else ():
                matrix, slope = logits.slope(block, terms)
                if grad_hidden is not None:
                    grad_hidden += (slope @ matrix)[: len(hidden)]
                if grad_weight is not None:
                    grad_weight[block] = slope.T @ logits.hidden
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
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
        return grad_hidden, grad_weight, None, None, None, None


class _Logits:
    """The logits of (N, H) rows in blocks of the vocabulary, and what is made of them.

    Products are in the format of ``hidden``; all that is done to a logit is done in float32, on a
    CPU in parts that stay in its cache. There rows of zeros stand behind the N, so that products
    have a number of rows that others have had (``pad_to_bucket``): ``hidden`` has M rows then.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, rule: LogitTransform
    ) -> None:
        self.weight, self.targets, self.rule = weight, targets, rule
        count, self.vocabulary = len(targets), weight.shape[0]
        self.hidden = (
            padded(hidden, pad_to_bucket(count) - count, 0, 0) if hidden.is_cpu else hidden
        )
        width = max(MIN_COLUMNS, BLOCK_LOGITS // max(count, 1) // MIN_COLUMNS * MIN_COLUMNS)
        self.blocks = [slice(a, a + width) for a in range(0, self.vocabulary, width)]
        self._rows = max(1, CACHED_LOGITS // width if hidden.is_cpu else count)
        self._keeps = count * self.vocabulary <= KEPT_LOGITS
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._norms = hidden.new_full((count, 1), float("-inf"), dtype=torch.float32)

    def total(self, terms: LossConfig) -> Tensor:
        """The loss of all rows; NaN where a target is not in the vocabulary."""
        hits = torch.full_like(self._norms, float("nan"))
        sums = torch.zeros_like(self._norms)
        for block in self.blocks:
            product = self._product(block)
            inside, place = self._goals(block, product[1])
            for rows, part in self._parts(product[1]):
                logits = self.rule(part.float())
                norm = logits.logsumexp(-1, keepdim=True)
                self._norms[rows] = torch.logaddexp(self._norms[rows], norm)
                hits[rows] = hits[rows].where(~inside[rows], logits.gather(1, place[rows]))
                if terms.label_smoothing:
                    sums[rows] += logits.sum(-1, keepdim=True)
            if self._keeps:
                self._kept[block.start] = product
        share = terms.label_smoothing
        losses = self._norms - (1 - share) * hits
        if share:
            losses -= share / self.vocabulary * sums
        if terms.z_loss:
            losses += terms.z_loss * self._norms.square()
        return losses.sum()

    def slope(self, block: slice, terms: LossConfig) -> tuple[Tensor, Tensor]:
        """The block of the weight (W, H), and the gradient with respect to its products (M, W).

        It is softmax minus target; to be called after ``total``, once for each block.
        """
        kept = block.start in self._kept
        matrix, products = self._kept.pop(block.start) if kept else self._product(block)
        inside, place = self._goals(block, products)
        share = terms.label_smoothing
        goal = inside.float() * (share - 1)
        for rows, part in self._parts(products):
            logits = self.rule(part.float())
            bend = self.rule.slope(logits)
            slope = (logits - self._norms[rows]).exp_()
            if terms.z_loss:
                slope *= 1 + 2 * terms.z_loss * self._norms[rows]
            if share:
                slope -= share / self.vocabulary
            slope.scatter_add_(1, place[rows], goal[rows])
            part.copy_(slope if bend is None else slope.mul_(bend))
        products[len(self.targets) :] = 0
        return matrix, products

    def _product(self, block: slice) -> tuple[Tensor, Tensor]:
        matrix = self.weight[block].to(self.hidden.dtype)
        return matrix, self.hidden @ matrix.T

    def _goals(self, block: slice, products: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each target is in a block, and where in it (anywhere if not); (N, 1) each."""
        place = (self.targets - block.start)[:, None]
        width = products.shape[1]
        return (place >= 0) & (place < width), place.clamp(0, width - 1)

    def _parts(self, products: Tensor) -> Iterator[tuple[slice, Tensor]]:
        count = len(self.targets)
        for start in range(0, count, self._rows):
            rows = slice(start, min(start + self._rows, count))
            yield rows, products[rows]
