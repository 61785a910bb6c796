"""What attention backends have in common: their signatures, and what a call hands them.

Shapes: B batch, H query heads, K key heads (H is a multiple of K), S queries, T keys (the queries
are those of the last S keys), D width of a head of queries and keys, V of values.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
REMEMBERED = 4
"""Results: layers with and without a sliding window have masks of their own."""


class AttentionOptions(NamedTuple):
    """How scores become weights."""

    causal: bool = True
    """Whether a token sees only those up to itself."""
    scaling: float | None = None
    """Factor on the scores; 1 / sqrt(D) when None."""
    dropout: float = 0.0
    """Probability with which a weight is dropped."""
    sliding_window: int | None = None
    """Tokens that a token sees to the left, itself included, and as many to the right where
    attention is not causal; all when None."""
    softcap: float | None = None
    """Scores are ``softcap * tanh(scores / softcap)``; as they are when None."""
    sinks: Tensor | None = None
    """(H,) learned scores: one more column of the softmax, which no value belongs to."""

    @property
    def window(self) -> tuple[int, int]:
        """Tokens seen to the left and to the right, -1 for all, as flash-attn takes them."""
        left = -1 if self.sliding_window is None else self.sliding_window - 1
        return left, 0 if self.causal else left


class Packing(NamedTuple):
    """The samples of a packed row."""

    cu_seqlens: Tensor
    """(samples + 1,) int32, where samples begin and end, from 0 to the length of the row."""
    max_seqlen: int
    """Tokens of the longest sample."""


DenseKernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, AttentionOptions], Tensor]
"""Attention of (B, H, S, D) queries to (B, K, T, D) keys and (B, K, T, V) values: (B, S, H, V)."""
PackedKernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, Packing, AttentionOptions], Tensor]
"""The same for one row, B = 1 and S = T, whose samples do not see each other."""
PaddedKernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, AttentionOptions], Tensor]
"""The same as a ``DenseKernel``, with a mask (B, T), 0 at padding, after the values."""


class OncePerTensor(Generic[Result]):
    """A function of a tensor, and of hashable settings, that remembers its last results.

    All layers of a kind are called with the same tensor, and the CPU has to wait for a GPU each
    time to look at its values.
    """

    def __init__(self, function: Callable[..., Result]) -> None:
        self.function = function
        self._last: deque[tuple[weakref.ref[Tensor], int, tuple[Hashable, ...], Result]]
        self._last = deque(maxlen=REMEMBERED)

    def __call__(self, tensor: Tensor, *settings: Hashable) -> Result:
        if tensor.is_inference():  # it has no version
            return self.function(tensor, *settings)
        for seen, version, asked, result in self._last:
            if seen() is tensor and version == tensor._version and asked == settings:
                return result
        result = self.function(tensor, *settings)
        self._last.appendleft((weakref.ref(tensor), tensor._version, settings, result))
        return result


@OncePerTensor
def sample_lengths(cu_seqlens: Tensor) -> list[int]:
    """The tokens of each packed sample."""
    return [int(length) for length in cu_seqlens.diff().tolist()]


@OncePerTensor
def padding_of(mask: Tensor) -> tuple[bool, bool]:
    """Of a (B, T) mask: whether there is padding, and whether it is only after the last tokens."""
    tokens = mask.bool()
    facts = torch.stack([tokens.all(), (tokens[:, 1:] <= tokens[:, :-1]).all()])
    is_whole, right = facts.tolist()
    return not is_whole, right
