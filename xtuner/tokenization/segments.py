"""Tokenising a text in pieces, each as what it is: the continuation of the text before it.

A question and an answer must be tokenised apart, since at generation the question stands alone and
no token may reach across the seam. But tokenised as if nothing stood before it, an answer gets a
leading space from SentencePiece-like tokenizers, which the joined text does not have, and which the
model would learn to say.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from xtuner.tokenization.word_cache import (
    REMEMBERED,
    SHORT,
    Cut,
    Ids,
    Words,
    cut,
    is_word_separable,
    lasts,
)
from xtuner.utils.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX

Tokens = npt.NDArray[np.int32]
ITEM = 4
"""Bytes of a token id."""

_MARK = "\0"
"""Around the number of a tail; also keeps the seams of words away from where a part begins."""
_IMAGE_MARK = "<image"
"""Stands for an image; neither a word, which begins with its space, nor a part, with ``_MARK``."""
_FIXED_MARK = "<token"
"""Before a bos or eos that the tokenizer does not find in a text; no word or part either."""

COMPARED = 16
_IMAGE = re.compile(f"({re.escape(DEFAULT_IMAGE_TOKEN)})")


def split_images(text: str) -> list[str]:
    """A text cut around each ``<image>``, which become pieces of their own."""
    return [piece for piece in _IMAGE.split(text) if piece]


def prefix_ids(tokenizer: Any) -> list[int]:
    """The ids with which a sample begins: bos, or what ChatGLM has in its place; may be none."""
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    return list(getattr(tokenizer, "prefix_tokens", None) or [])


def bos_and_eos(tokenizer: Any) -> tuple[str, str]:
    """The texts of ``prefix_ids`` and eos; empty where there is none."""
    prefix = "".join(tokenizer.convert_ids_to_tokens(prefix_ids(tokenizer)))
    return tokenizer.bos_token or prefix, tokenizer.eos_token or ""


def encode_segments(
    tokenizer: Any, segments: Sequence[str], with_image_token: bool = False
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
        ``encode_segments(tokenizer, ["USER: hi ASSISTANT:", "Hello.", "</s>"])``
    """
    return SegmentEncoder(tokenizer, with_image_token)([segments])[0]


class SegmentEncoder:
    """``encode_segments`` for many texts: what can be is tokenised in one call, and only once.

    Args:
        tokenizer: of transformers.
        with_image_token: as for ``encode_segments``.
        many: whether so much text is to come that a look at the tokenizer pays.
    """

    def __init__(
        self, tokenizer: Any, with_image_token: bool = False, *, many: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.with_image_token = with_image_token
        self.bos, self.eos = bos_and_eos(tokenizer)
        self._added = {token for token in tokenizer.get_added_vocab() if token}
        self._last_characters = {token[-1] for token in self._added}
        self._sizes = sorted({len(token) for token in self._added}, reverse=True)
        self._longest = max(self._sizes, default=1)
        self._tails: list[str] = []
        self._numbers: dict[str, int] = {}
        self._heads: dict[str, str] = {}
        self._known: dict[str, Ids] = {}
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._compared = False
        self._fixed = self._not_in_text()
        self._words = None
        if many and is_word_separable(tokenizer, self._batch):
            self._words = Words(tokenizer, self._batch)

    def __call__(self, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Tokenise several texts, each given in pieces; the ids of each piece."""
        ids, sizes = self.joined(texts)
        segments = iter(np.split(ids, np.cumsum(sizes)))
        return [[next(segments).tolist() for _ in text] for text in texts]

    def joined(self, texts: Sequence[Sequence[str]]) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """The same, the ids of all pieces one after the other, and how many each piece has."""
        marked, firsts = self._marked(texts)
        words, numbers, starts = _told_apart(marked) if self._words is None else cut(marked)
        ids, sizes = _spelled(self._ids(words), numbers)
        ends = np.concatenate([[0], np.cumsum(sizes)])
        return ids, np.diff(ends[starts[firsts]])

    def _marked(self, texts: Sequence[Sequence[str]]) -> tuple[list[str], list[int]]:
        """All that the ids depend on: parts of pieces, each behind the number of its tail.

        Returns:
            The parts, and which of them each piece begins with, followed by how many there are.
        """
        marked: list[str] = []
        firsts: list[int] = []
        longest, head = self._longest, self._head
        parts = _whole if self._words is None else self._words.parts
        for segments in texts:
            before = ""
            for piece in segments:
                firsts.append(len(marked))
                if self.with_image_token and piece == DEFAULT_IMAGE_TOKEN:
                    marked.append(_IMAGE_MARK)
                    continue
                if piece in self._fixed:
                    marked.append(_FIXED_MARK + piece)
                    before = ""
                    continue
                for part in parts(piece):
                    marked.append(head(before) + part)
                    before = part if len(part) >= longest else before[-longest:] + part
        return marked, [*firsts, len(marked)]

    def _head(self, text: str) -> str:
        """What stands before a part, so that equal parts after different tails are different.

        Args:
            text: what was before the part.
        """
        end = text[-1:]
        if end in self._last_characters:
            end = text[-self._longest :]
        head = self._heads.get(end)
        if head is None:
            ends = (end[-size:] for size in self._sizes)
            tail = next((token for token in ends if token in self._added), end[-1:])
            number = self._numbers.setdefault(tail, len(self._tails))
            if number == len(self._tails):
                self._tails.append(tail)
            if len(self._heads) > REMEMBERED:
                self._heads.clear()
            head = self._heads[end] = f"{_MARK}{number}{_MARK}"
        return head

    def _ids(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of words with their space and of parts with their head, each given once."""
        known = self._known
        if len(known) > REMEMBERED:
            known.clear()
        known[_IMAGE_MARK] = packed_ids([IMAGE_TOKEN_INDEX])
        known.update({_FIXED_MARK + text: ids for text, ids in self._fixed.items()})
        found: list[Any] = list(map(known.get, texts))
        places = [place for place, ids in enumerate(found) if ids is None]
        new = [texts[place] for place in places]
        parts = [text for text in new if text[0] == _MARK]
        fresh = dict(zip(parts, self._continued(parts), strict=True))
        if self._words is not None:
            words = [text for text in new if text[0] != _MARK]
            fresh.update(zip(words, self._words.ids(words), strict=True))
        for place, text in zip(places, new, strict=True):
            found[place] = fresh[text]
            if len(text) <= SHORT and (text[0] == _MARK or lasts(text)):
                known[text] = fresh[text]
        return found

    def _not_in_text(self) -> dict[str, Ids]:
        """The ids of bos and eos, where they are no single token when they stand in a text."""
        eos = self.tokenizer.eos_token_id
        ids = {self.bos: prefix_ids(self.tokenizer), self.eos: [] if eos is None else [eos]}
        return {
            text: packed_ids(own)
            for text, own in ids.items()
            if text and own and not self._is_found(text, packed_ids(own))
        }

    def _is_found(self, token: str, ids: Ids) -> bool:
        return token in self._added and self._encode("a" + token) == self._encode("a") + ids

    def _continued(self, parts: Sequence[str]) -> list[Ids]:
        """The ids of parts after the tails that stand before them."""
        split = [part.split(_MARK, 2)[1:] for part in parts]
        numbers = sorted({int(number) for number, _ in split})
        tails = [self._tails[number] for number in numbers]
        heads = dict(zip(map(str, numbers), self._batch(tails), strict=True))
        both = self._batch([self._tails[int(number)] + text for number, text in split])
        found: list[Ids] = []
        alone: list[int] = []
        for (number, _), ids in zip(split, both, strict=True):
            head = heads[number]
            if not ids.startswith(head):
                alone.append(len(found))
            found.append(ids[len(head) :])
        for place, ids in zip(alone, self._batch([split[n][1] for n in alone]), strict=True):
            found[place] = ids
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


def ids_of(packed: Ids) -> Tokens:
    """Token ids from the bytes of int32 numbers."""
    return np.frombuffer(packed, dtype=np.int32)


def packed_ids(ids: Sequence[int]) -> Ids:
    """Token ids as the bytes of int32 numbers."""
    return array("i", ids).tobytes()


def _whole(text: str) -> list[str]:
    """A text as its parts, when it has but one."""
    return [text] if text else []


def _told_apart(texts: Sequence[str]) -> Cut:
    """Texts that stay whole: each a word of its own."""
    places: dict[str, int] = {}
    numbers = [places.setdefault(text, len(places)) for text in texts]
    return Cut(list(places), np.array(numbers, dtype=np.int64), np.arange(len(texts) + 1))


def _spelled(
    words: Sequence[Ids], numbers: npt.NDArray[np.integer]
) -> tuple[Tokens, npt.NDArray[np.int64]]:
    """The ids of words one after the other, and how many each has.

    Args:
        words: the ids of each different one.
        numbers: which of them stand one after the other.
    """
    all_ids = ids_of(b"".join(words))
    sizes = np.array([len(ids) for ids in words], dtype=np.int64) // ITEM
    starts = np.cumsum(sizes) - sizes
    taken = sizes[numbers]
    ends = np.cumsum(taken)
    places = np.repeat(starts[numbers] - (ends - taken), taken)
    places += np.arange(len(places))
    return all_ids[places], taken
