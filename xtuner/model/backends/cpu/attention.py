"""Causal attention on a CPU, over samples that stand one after the other in a row.

The forward is torch's kernel in bf16, sample by sample. Its backward is slow on all but long
samples, so there are two others, as exact as eager attention in bf16 or more:

* compiled runs: samples of about a length are put together, and their gradients are products of
  batches of matrices, with one kernel of our own for what lies between the products. The scores of
  these samples are formed, a few megabytes at a time.
* other runs: torch's own kernel in float32, up to three times as fast as in bf16 on short samples.

Shapes: T tokens of the row, H query heads, K key heads, S tokens of a sample, D width of a head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from xtuner.model.backends.case import Case
from xtuner.model.backends.cpu.kernels import Kernel, rowwise_dot, softmax_backward
from xtuner.model.backends.interfaces import (
    AttentionOptions,
    DenseKernel,
    PackedKernel,
    Packing,
    sample_lengths,
)
from xtuner.model.backends.registry import Backend
from xtuner.utils.lang import tr
from xtuner.utils.types import AutogradContext

SHORT = 384
"""Tokens up to which torch's backward is quicker in float32; measured with heads of 64."""
LONGEST = 768
"""Tokens up to which products of whole matrices are quicker than torch's kernel; likewise."""
STEP = 64
"""Samples computed in one batch are padded to a multiple of so many tokens."""
SCORES = 2**23
"""Scores of a batch: 16 MiB, twice; more only where one sample has more."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scaling: float | None
) -> Tensor:
    """Attend causally within each sample.

    Args:
        query: (1, H, T, D) in bfloat16.
        key: (1, K, T, D), likewise; H is a multiple of K.
        value: (1, K, T, D), likewise.
        lengths: the S of each sample; their sum is T.
        scaling: factor on the scores; 1 / sqrt(D) when None.

    Returns:
        (1, T, H, D) in bfloat16.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out: Tensor = _Attention.apply(q, k, v, [length for length in lengths if length], scale)
    return out[None]


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, options: AttentionOptions
) -> Tensor:
    lengths = sample_lengths(packing.cu_seqlens)
    return attend(query, key, value, lengths, options.scaling)


def _attend_rows(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    rows, length = query.shape[0], query.shape[2]
    q, k, v = (tensor.transpose(0, 1).flatten(1, 2)[None] for tensor in (query, key, value))
    out = attend(q, k, v, [length] * rows, options.scaling)
    return out[0].unflatten(0, (rows, length))


def _unsupported(case: Case) -> str | None:
    if case.dtype is not torch.bfloat16:
        return tr("it is for bfloat16")
    if not case.causal or case.sliding_window or case.softcap or case.sinks or case.dropout:
        return tr("it is for causal attention alone")
    if case.cached:
        return tr("it has no cached keys")
    if case.qk_width != case.v_width:
        return tr("it is for heads of one width")
    return None


PACKED: Backend[PackedKernel] = Backend(
    "CPU kernels", _unsupported, lambda case: _attend_packed, device="cpu"
)
DENSE: Backend[DenseKernel] = Backend(
    "CPU kernels", _unsupported, lambda case: _attend_rows, device="cpu"
)


class _Attention(torch.autograd.Function):
    """Queries (T, H, D), keys and values (T, K, D) -> (T, H, D); only these are kept."""

    @staticmethod
    def forward(
        ctx: AutogradContext,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: list[int],
        scale: float,
    ) -> Tensor:
        out = torch.empty(query.shape, dtype=query.dtype)
        norms = torch.empty(query.shape[:2])  # the log-sum-exp of each token's scores
        keys, values = (_for_each_query(tensor, query) for tensor in (key, value))
        for part in _parts(lengths):
            found, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(_heads_first(tensor[part]) for tensor in (query, keys, values)),
                dropout_p=0.0,
                is_causal=True,
                scale=scale,
            )
            out[part] = found[0].transpose(0, 1)
            norms[part] = norm[0].t()
        ctx.save_for_backward(query, key, value, out, norms)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> Any:
        query, key, value, *rest = ctx.saved_tensors
        keys, values = (_for_each_query(tensor, query) for tensor in (key, value))
        row = _Row(grads[0], (query, keys, values, *rest), ctx.scale)
        parts = list(_parts(ctx.lengths))
        if Kernel.compiled:
            row.backward_by_matmul([part for part in parts if _size(part) <= LONGEST])
            parts = [part for part in parts if _size(part) > LONGEST]
        for part in parts:
            row.backward_by_torch(part)
        of_query, *others = row.grads
        if keys is not key:  # of a key it is the sum over the queries that share it
            others = [grad.unflatten(1, (key.shape[1], -1)).sum(2) for grad in others]
        return of_query, *others, None, None


class _Row:
    """The backward of a row: each method fills in the gradients of some samples.

    Args:
        grad: (T, H, D), of the output.
        saved: query, key, value, output, each (T, H, D), and log-sum-exp of the scores (T, H).
        scale: factor on the scores.
    """

    def __init__(self, grad: Tensor, saved: Sequence[Tensor], scale: float) -> None:
        query, key, value, self.out, self.norms = saved
        self.tensors = (query, key, value, grad)
        self.scale = scale
        self.grads = tuple(torch.empty(query.shape, dtype=query.dtype) for _ in range(3))
        """Of query, key and value."""

    def backward_by_torch(self, part: slice) -> None:
        """One sample, by torch's kernel."""
        dtype = torch.float32 if _size(part) <= SHORT else self.out.dtype
        query, key, value, grad, out = (
            _heads_first(tensor[part]).to(dtype, memory_format=torch.contiguous_format)
            for tensor in (*self.tensors, self.out)
        )
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, self.norms[part].t()[None], 0.0, True, scale=self.scale
        )
        for whole, one in zip(self.grads, found, strict=True):
            whole[part] = one[0].transpose(0, 1)

    def backward_by_matmul(self, parts: list[slice]) -> None:
        """Samples in batches of about a length, by products of matrices."""
        if not parts:
            return
        dots = rowwise_dot(self.tensors[3], self.out)
        alike: dict[int, list[slice]] = defaultdict(list)
        for part in parts:
            alike[-(-_size(part) // STEP) * STEP].append(part)
        heads = self.out.shape[1]
        for length, members in alike.items():
            count = max(1, SCORES // (heads * length**2))
            for start in range(0, len(members), count):
                self._batch(members[start : start + count], length, dots)

    def _batch(self, parts: list[slice], length: int, dots: Tensor) -> None:
        """Samples padded to ``length`` tokens; ``dots`` (T, H) are the row's."""
        count, (_, heads, width) = len(parts), self.out.shape
        # zeros behind a sample: no token sees them, and their own gradients are 0
        batch = self.out.new_zeros(4, count, heads, length, width)
        facts = self.norms.new_zeros(2, count, heads, length, 1)
        for place, part in enumerate(parts):
            tokens = slice(0, _size(part))
            for kind, tensor in enumerate(self.tensors):
                batch[kind, place, :, tokens] = tensor[part].transpose(0, 1)
            for kind, fact in enumerate((self.norms, dots)):
                facts[kind, place, :, tokens, 0] = fact[part].t()
        query, key, value, grad = batch.flatten(1, 2)
        norm, dot = facts.flatten(1, 2)
        weights = query @ key.mT
        grad_weights = grad @ value.mT
        softmax_backward(weights, grad_weights, norm, dot, self.scale)
        weights.tril_(), grad_weights.tril_()
        found = (grad_weights @ key, grad_weights.mT @ query, weights.mT @ grad)
        for whole, one in zip(self.grads, found, strict=True):
            by_sample = one.view(count, heads, length, width)
            for place, part in enumerate(parts):
                whole[part] = by_sample[place, :, : _size(part)].transpose(0, 1)


def _parts(lengths: Sequence[int]) -> Iterator[slice]:
    """Where each sample stands in the row."""
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def _size(part: slice) -> int:
    return int(part.stop - part.start)


def _for_each_query(tensor: Tensor, query: Tensor) -> Tensor:
    """Keys or values (T, K, D) -> (T, H, D), one for each head of the queries."""
    groups = query.shape[1] // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def _heads_first(tensor: Tensor) -> Tensor:
    """(S, H, D) -> (1, H, S, D)."""
    return tensor.transpose(0, 1)[None]
