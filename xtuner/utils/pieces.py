"""Tokenising a text in pieces, each as what it is: the continuation of the text before it.

A question and an answer must be tokenised apart, since at generation the question stands alone and
no token may reach across the seam. But tokenised as if nothing stood before it, an answer gets a
leading space from SentencePiece-like tokenizers, which the joined text does not have, and which the
model would learn to say.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from xtuner.utils.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from xtuner.utils.words import Ids, WordCache, goes_word_by_word

Key = tuple[str, str]
"""The end of the text before a piece, and the piece."""
_IMAGE_KEY: Key = ("", "")
"""Of an image's mark; no piece has it, as empty ones have no key."""

SHORT = 64
"""Characters of pieces that are remembered: those of templates come again and again."""
REMEMBERED = 20_000
COMPARED = 16
_IMAGE = re.compile(f"({re.escape(DEFAULT_IMAGE_TOKEN)})")


def split_images(text: str) -> list[str]:
    """A text cut around each ``<image>``, which become pieces of their own."""
    return [piece for piece in _IMAGE.split(text) if piece]


def encode_pieces(
    tokenizer: Any, pieces: Sequence[str], with_image_token: bool = False
) -> list[list[int]]:
    """Tokenise consecutive pieces of one text.

    Args:
        tokenizer: of transformers.
        pieces: the text in order; special tokens are recognised, none is added.
        with_image_token: a piece that is ``<image>`` becomes one ``IMAGE_TOKEN_INDEX``; to what
            follows it is no text.

    Returns:
        The ids of each piece. Joined they are the ids of the joined text, but for tokens that would
        reach across a seam.

    Example:
        ``encode_pieces(tokenizer, ["USER: hi ASSISTANT:", "Hello.", "</s>"])``
    """
    return PieceEncoder(tokenizer, with_image_token)([pieces])[0]


class PieceEncoder:
    """``encode_pieces`` for many texts: what can be is tokenised in one call, and only once.

    Args:
        tokenizer: of transformers.
        with_image_token: as for ``encode_pieces``.
        many: whether so much text is to come that a look at the tokenizer pays.
    """

    def __init__(
        self, tokenizer: Any, with_image_token: bool = False, *, many: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.with_image_token = with_image_token
        self.bos, self.eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._endings: dict[str, list[str]] = {}
        for token in filter(None, added):
            self._endings.setdefault(token[-1], []).append(token)
        self._longest = len(added[0]) if added else 1
        self._tails: dict[str, str] = {}
        self._known: dict[Key, Ids] = {}
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._compared = False
        self._words = None
        if many and goes_word_by_word(tokenizer, self._batch):
            self._words = WordCache(tokenizer, self._batch)

    def __call__(self, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Tokenise several texts, each given in pieces; the ids of each piece."""
        return [[ids_of(piece).tolist() for piece in pieces] for pieces in self.packed(texts)]

    def packed(self, texts: Sequence[Sequence[str]]) -> list[list[Ids]]:
        """The same, the ids of a piece as the bytes of int32 numbers."""
        keyed = [self._keys(pieces) for pieces in texts]
        found = self._encode_all({key for pieces in keyed for keys in pieces for key in keys})
        return [[b"".join(map(found.__getitem__, keys)) for keys in pieces] for pieces in keyed]

    def _keys(self, pieces: Sequence[str]) -> list[list[Key]]:
        """For each piece what its ids depend on: ends of the text before, and what comes."""
        keys: list[list[Key]] = []
        before = ""
        for piece in pieces:
            if self.with_image_token and piece == DEFAULT_IMAGE_TOKEN:
                keys.append([_IMAGE_KEY])
                continue
            own = []
            parts = [piece] if self._words is None else self._words.parts(piece)
            for part in filter(None, parts):
                own.append((self._tail(before), part))
                before = (before + part[-self._longest :])[-self._longest :]
            keys.append(own)
        return keys

    def _tail(self, text: str) -> str:
        """As much of the end of a text as decides how what follows is tokenised."""
        last = text[-1:]
        if last not in self._endings:
            return last
        end = text[-self._longest :]
        if end not in self._tails:
            if len(self._tails) > REMEMBERED:
                self._tails.clear()
            tokens = self._endings[last]
            self._tails[end] = next((token for token in tokens if end.endswith(token)), last)
        return self._tails[end]

    def _encode_all(self, wanted: Collection[Key]) -> dict[Key, Ids]:
        known = self._known
        if len(known) > REMEMBERED:
            known.clear()
        known[_IMAGE_KEY] = packed_ids([IMAGE_TOKEN_INDEX])
        found = {key: known[key] for key in wanted if key in known}
        new = [key for key in wanted if key not in found]
        if self._words is None:
            found |= self._continued(new)
        else:
            self._words.forget()
            split = [self._words.split(piece) for _, piece in new]
            words = self._words.learn().__getitem__
            starts = [(tail, parts[0]) for (tail, _), parts in zip(new, split, strict=True)]
            begun = self._continued(set(starts))
            for key, start, (_, *rest) in zip(new, starts, split, strict=True):
                found[key] = begun[start] + b"".join(map(words, rest))
        known.update((key, found[key]) for key in new if len(key[1]) <= SHORT)
        return found

    def _continued(self, keys: Collection[Key]) -> dict[Key, Ids]:
        """The ids of pieces after the tails that stand before them."""
        known = self._known
        found = {key: known[key] for key in keys if key in known}
        new = [key for key in keys if key not in found]
        tails = sorted({tail for tail, _ in new if tail})
        heads = dict(zip(tails, self._batch(tails), strict=True))
        alone = []
        both = self._batch([tail + piece for tail, piece in new])
        for key, ids in zip(new, both, strict=True):
            head = heads.get(key[0], b"")
            if ids.startswith(head):
                found[key] = ids[len(head) :]
            else:
                alone.append(key)
        for key, ids in zip(alone, self._batch([piece for _, piece in alone]), strict=True):
            found[key] = ids
        known.update((key, found[key]) for key in new if len(key[1]) <= SHORT)
        return found

    def _batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of texts that stand alone, by the quickest way that gives the right ones."""
        if self._backend is None or not texts:
            return [self._encode(text) for text in texts]
        self._backend.no_padding()
        self._backend.no_truncation()
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ids = [packed_ids(each.ids) for each in encoded]
        if not self._compared:  # a tokenizer may do more than its backend
            self._compared = len(texts) >= COMPARED
            if any(self._encode(t) != own for t, own in zip(texts[:COMPARED], ids, strict=False)):
                self._backend = None
                return [self._encode(text) for text in texts]
        return ids

    def _encode(self, text: str) -> Ids:
        return packed_ids(self.tokenizer.encode(text, add_special_tokens=False))


def ids_of(packed: Ids) -> npt.NDArray[np.int32]:
    """Token ids from the bytes of int32 numbers."""
    return np.frombuffer(packed, dtype=np.int32)


def packed_ids(ids: Sequence[int]) -> Ids:
    """Token ids as the bytes of int32 numbers."""
    return array("i", ids).tobytes()
