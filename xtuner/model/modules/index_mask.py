"""Masks that let tokens see later ones: the image tokens of Gemma 3 and 4, prefixes of a prompt.

transformers describes a mask by a function of indices, composed of simpler ones. Our attention is
causal, or sees all tokens, by ``is_causal`` of the layer. The union of the causal function with
another one is kept, and evaluated sample by sample: no mask of a whole packed row is made.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

MaskFunction: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Indices of row, head, query and key, to be broadcast, to True where the query sees the key."""


def lets_see_later_tokens(function: object) -> bool:
    """Whether a mask function is the union of another one with the causal one."""
    if getattr(function, "__qualname__", "").startswith("or_masks."):
        return True
    return any(lets_see_later_tokens(part) for part in _parts(function))


def _parts(function: object) -> Iterator[object]:
    """The functions that a function is composed of."""
    for cell in getattr(function, "__closure__", None) or ():
        content = cell.cell_contents
        for part in content if isinstance(content, tuple | list) else (content,):
            if hasattr(part, "__closure__"):
                yield part


class IndexMask:
    """The mask of a call, as a function of indices.

    Args:
        function: of the call.
        shape: (B, S, T), rows, queries and keys of the call.
        offsets: the indices of its first query and key, where earlier tokens are cached.
        padding: (B, T), 0 where there is padding; None when there is none.
        device: where the mask is needed.
    """

    def __init__(
        self,
        function: MaskFunction,
        shape: tuple[int, int, int],
        offsets: tuple[int, int],
        padding: Tensor | None,
        device: torch.device | str,
    ) -> None:
        self.function, self.shape, self.offsets = function, shape, offsets
        self.padding, self.device = padding, device
        self._of_samples: dict[tuple[tuple[int, ...], int | None], list[Tensor | None]] = {}
        self._of_rows: Tensor | None = None

    def of_samples(self, lengths: Sequence[int], window: int | None = None) -> list[Tensor | None]:
        """The masks of the samples of a packed row, compared with those they have anyway.

        The CPU waits for a GPU once, in the first layer that asks.

        Args:
            lengths: tokens of each sample.
            window: tokens that a token sees without the mask, itself included; None for all.

        Returns:
            (length, length) for each sample, True where a token sees another; None where that is
            what each sees without the mask.
        """
        asked = (tuple(lengths), window)
        if asked not in self._of_samples:
            masks, differ = [], []
            for stop, length in zip(itertools.accumulate(lengths), lengths, strict=True):
                tokens = torch.arange(stop - length, stop, device=self.device)
                mask = self._evaluate(torch.zeros_like(tokens[:1]), tokens, tokens)[0, 0]
                plain = torch.ones_like(mask).tril()
                if window is not None:
                    plain = plain.triu(1 - window)
                masks.append(mask)
                differ.append((mask != plain).any())
            needed = torch.stack(differ).tolist()
            self._of_samples[asked] = [
                mask if own else None for mask, own in zip(masks, needed, strict=True)
            ]
        return self._of_samples[asked]

    def of_rows(self) -> Tensor:
        """(B, 1, S, T), True where a query sees a key that is no padding."""
        if self._of_rows is None:
            rows, queries, keys = (
                torch.arange(first, first + count, device=self.device)
                for first, count in zip((0, *self.offsets), self.shape, strict=True)
            )
            mask = self._evaluate(rows, queries, keys)
            if self.padding is not None:
                mask = mask & self.padding.to(self.device).bool()[:, None, None, keys]
            self._of_rows = mask
        return self._of_rows

    def _evaluate(self, rows: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        indices: Any = (
            rows[:, None, None, None],
            torch.zeros_like(rows[:1])[None, :, None, None],
            queries[None, None, :, None],
            keys[None, None, None, :],
        )
        mask = self.function(*indices)
        return mask.expand(len(rows), 1, len(queries), len(keys))
