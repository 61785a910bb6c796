"""Projection to the vocabulary and cross-entropy, block by block, never with all logits at once.

The forward pass computes the gradients as well: the largest tensor is the gradient of the head,
whatever the number of tokens and the size of the vocabulary.

Shapes: N supervised tokens, H width, V vocabulary, W columns of a block of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from xtuner.parallel.sequence.padding import padded
from xtuner.utils.types import AutogradContext

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What configurations call the bound of the logits: Gemma 2 and later, RecurrentGemma, xLSTM."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the projection: scale, then soft cap."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> LogitTransform:
        """Read it from a transformers config (Cohere, Granite and Gemma have one)."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        caps = [getattr(config, name, None) for name in SOFT_CAPS]
        return cls(scale, next((cap for cap in caps if cap is not None), None))

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits / self.softcap)

    def derivative(self, logits: Tensor) -> Tensor | float | None:
        """The derivative, by the transformed logits; None where it is 1."""
        if self.softcap is None:
            return None if self.scale == 1.0 else self.scale
        return (1 - (logits / self.softcap).square()).mul_(self.scale)


@dataclass(frozen=True)
class LossConfig:
    """Terms of the loss of a token beside its cross-entropy.

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


def _unpadded(rows: int) -> int:
    return rows


class BlockSizes(NamedTuple):
    """How the logits are divided; a device has its own."""

    logits: int
    """Logits of a block of the vocabulary, in the dtype of the products, ..."""
    min_columns: int
    """... but never fewer columns than this: narrow products leave most of a processor idle."""
    kept_logits: int
    """No more than these are kept for the second pass; computing them again is cheaper than
    memory."""
    part_logits: int
    """Logits of a block that are processed in float32 at once."""
    padded_rows: Callable[[int], int] = _unpadded
    """The number of rows that products of N rows are padded to."""
    most_parts: int = 0
    """Parts of all logits, about at most: of many, more are processed at once. 0 for no limit."""
    min_rows: int = 0
    """Rows of a group that are worth products of their own. 0: all rows are one group."""
    kept_with_gradient: bool = False
    """Whether more are kept, block by block, where the weight is trained: as many as it has
    numbers, in half precision half the memory of its gradient. Those of other weights come later.
    """

    def kept_of(self, count: int, weight: Tensor, trained: bool) -> int:
        """How many logits of ``count`` rows are kept for the second pass."""
        total = count * len(weight)
        if total <= self.kept_logits:
            return total
        return min(total, weight.numel()) if self.kept_with_gradient and trained else 0

    def part_of(self, total: int) -> int:
        """How many of ``total`` logits are processed in float32 at once."""
        return max(self.part_logits, total // self.most_parts if self.most_parts else 0)

    def groups_of(self, count: int, vocabulary: int) -> list[slice]:
        """Groups of rows whose logits are kept; one of all rows where such groups are too small."""
        most = self.kept_logits // vocabulary
        if not self.min_rows or most < self.min_rows or count <= most:
            return [slice(0, count)]
        size = math.ceil(count / math.ceil(count / most))
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class FusedCrossEntropy(torch.autograd.Function):
    """The sum of the losses of (N, H) hidden states; the forward pass computes the gradients.

    A first pass over the blocks finds the log-sum-exp of each row. A second turns the logits into
    their gradients in place, and these into those of hidden states and weight. Few logits are kept
    from the first pass to the second, many are computed again: that is one product in four, and a
    large vocabulary then costs no memory but its gradient. Where the weight is not cast, the rows
    are divided into groups instead, small enough that the logits of one are kept.

    In float16 gradients are computed in float32: what is small would underflow before the gradient
    scaler's factor reaches it.
    """

    @staticmethod
    def forward(
        ctx: AutogradContext,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        transform: LogitTransform,
        config: LossConfig,
        sizes: BlockSizes,
    ) -> Tensor:
        """Compute a scalar in float32.

        Args:
            ctx: of autograd.
            hidden: (N, H).
            weight: (V, H).
            targets: (N,) token ids.
            dtype: of the products.
            transform: what is done to the logits.
            config: further terms of the loss.
            sizes: of the blocks.
        """
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        wide = torch.float32 if dtype is torch.float16 else None
        with torch.autocast(hidden.device.type, enabled=False):
            narrow, count = hidden.to(dtype), len(hidden)
            groups = [slice(0, count)]
            if weight.dtype is dtype:  # else each group would cast the whole of it
                groups = sizes.groups_of(count, len(weight))
            grad_hidden = grad_weight = None
            if need_hidden:
                grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
            if need_weight:  # zeros where there is no token: other processes wait for it
                grad_weight = torch.empty_like(weight, dtype=wide or weight.dtype)
            total = torch.zeros((), device=hidden.device)
            for rows in groups:
                kept = sizes.kept_of(len(targets[rows]), weight, need_weight)
                logits = _Logits(narrow[rows], weight, targets[rows], transform, sizes, kept)
                total += logits.loss(config)
                grad_rows = None if grad_hidden is None else grad_hidden[rows]
                for block in logits.blocks if need_hidden or need_weight else ():
                    matrix, grad_logits = logits.backward(block, config, wide or dtype)
                    if grad_rows is not None:
                        grad_rows += (grad_logits @ matrix)[: len(logits.targets)]
                    if grad_weight is not None:
                        factor = logits.hidden.to(grad_logits.dtype)
                        _add_product(grad_weight[block], grad_logits.T, factor, rows.start == 0)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(wide or hidden.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients of hidden states and weight."""
        (grad_total,) = grads
        # In place, as a second weight of a large vocabulary is much memory; autograd itself refuses
        # a second backward pass over tensors that were changed.
        found = [
            None if grad is None else grad.mul_(grad_total.to(grad.dtype)).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return found[0], found[1], None, None, None, None, None


def _add_product(to: Tensor, one: Tensor, other: Tensor, first: bool) -> None:
    """Add a product to ``to`` (rows, columns), or write the first one."""
    if to.dtype is one.dtype:
        torch.addmm(to, one, other, beta=0 if first else 1, out=to)
    elif first:
        to.copy_(one @ other)
    else:
        to += one @ other


class _Logits:
    """The logits of (N, H) hidden states in blocks of the vocabulary, and their loss and gradient.

    Products are in the dtype of ``hidden``; everything else is computed in float32, in parts of
    ``sizes.part_of``. So many as ``kept`` stay from ``loss`` to ``backward``, others are computed
    again. ``self.hidden`` has ``sizes.padded_rows`` rows: zeros behind the N.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        transform: LogitTransform,
        sizes: BlockSizes,
        kept: int,
    ) -> None:
        self.weight, self.targets, self.transform = weight, targets, transform
        count, self.vocabulary = len(targets), weight.shape[0]
        self.hidden = padded(hidden, sizes.padded_rows(count) - count, 0, 0)
        columns = sizes.min_columns
        width = max(columns, sizes.logits // max(count, 1) // columns * columns)
        width = min(width, self.vocabulary)  # else few rows would seem to fill a part
        self.blocks = [slice(a, a + width) for a in range(0, self.vocabulary, width)]
        rows = max(1, sizes.part_of(count * self.vocabulary) // width)
        parts = max(1, math.ceil(count / rows))
        self._rows = max(1, math.ceil(count / parts))  # all parts are of one size
        self._room = kept
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._columns: dict[int, tuple[Tensor, Tensor]] = {}
        self._lse = hidden.new_full((count, 1), float("-inf"), dtype=torch.float32)

    def loss(self, config: LossConfig) -> Tensor:
        """The loss of all rows; NaN where a target is not in the vocabulary."""
        target_logits = torch.full_like(self._lse, float("nan"))
        sums = torch.zeros_like(self._lse)
        for block in self.blocks:
            product = self._product(block)
            inside, column = self._columns[block.start] = self._target_columns(block, product[1])
            for rows, part in self._parts(product[1]):
                logits = self.transform(part.float())
                lse = logits.logsumexp(-1, keepdim=True)
                self._lse[rows] = torch.logaddexp(self._lse[rows], lse)
                found = logits.gather(1, column[rows])
                target_logits[rows] = target_logits[rows].where(~inside[rows], found)
                if config.label_smoothing:
                    sums[rows] += logits.sum(-1, keepdim=True)
            size = len(self.targets) * len(product[0])
            if size <= self._room:
                self._room -= size
                self._kept[block.start] = product
        smoothing = config.label_smoothing
        losses = self._lse - (1 - smoothing) * target_logits
        if smoothing:
            losses -= smoothing / self.vocabulary * sums
        if config.z_loss:
            losses += config.z_loss * self._lse.square()
        return losses.sum()

    def backward(
        self, block: slice, config: LossConfig, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The block of the weight (W, H), and the gradient of its logits (padded N, W), in dtype.

        It is softmax minus target; to be called after ``loss``, once for each block.
        """
        kept = block.start in self._kept
        matrix, products = self._kept.pop(block.start) if kept else self._product(block)
        matrix, products = matrix.to(dtype), products.to(dtype)
        inside, column = self._columns.pop(block.start)
        smoothing = config.label_smoothing
        target = inside.float() * (smoothing - 1)
        for rows, part in self._parts(products):
            logits = self.transform(part.float())
            derivative = self.transform.derivative(logits)
            grad_logits = (logits - self._lse[rows]).exp_()
            if config.z_loss:
                grad_logits *= 1 + 2 * config.z_loss * self._lse[rows]
            if smoothing:
                grad_logits -= smoothing / self.vocabulary
            grad_logits.scatter_add_(1, column[rows], target[rows])
            part.copy_(grad_logits if derivative is None else grad_logits.mul_(derivative))
        products[len(self.targets) :] = 0
        return matrix, products

    def _product(self, block: slice) -> tuple[Tensor, Tensor]:
        matrix = self.weight[block].to(self.hidden.dtype)
        return matrix, self.hidden @ matrix.T

    def _target_columns(self, block: slice, products: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each target is in a block, and its column (any if not); (N, 1) each."""
        column = (self.targets - block.start)[:, None]
        width = products.shape[1]
        return (column >= 0) & (column < width), column.clamp(0, width - 1)

    def _parts(self, products: Tensor) -> Iterator[tuple[slice, Tensor]]:
        count = len(self.targets)
        for start in range(0, count, self._rows):
            rows = slice(start, min(start + self._rows, count))
            yield rows, products[rows]
