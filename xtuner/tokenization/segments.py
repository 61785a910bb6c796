"""Tokenising a text in segments, each as what it is: the continuation of the text before it.

A question and an answer are tokenised apart, since at generation the question is all there is and
no token may span the boundary. But a segment that is tokenised as if it began the text gets a
leading space from SentencePiece-like tokenizers, which the whole text does not have, and which the
model would learn to generate. So each segment is tokenised with its left context, the special token
or character before it, and the ids of the context are taken off again.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from xtuner.utils.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from xtuner.utils.types import Tokenizer

Tokens = npt.NDArray[np.int32]
PackedIds = bytes
"""Token ids as int32: joining those of many segments is then a copy of memory."""
ID_BYTES = 4
Segment = tuple[str, str]
"""A left context and the text that follows it: all that the ids of the text depend on."""

CACHED_LENGTH, CACHED_SEGMENTS = 64, 300_000
"""Characters of segments whose ids are kept (parts of templates come again), and how many are."""
COMPARED = 16
"""Texts on which the batch interface of a tokenizer's backend is compared with the tokenizer."""
_IMAGE = re.compile(f"({re.escape(DEFAULT_IMAGE_TOKEN)})")
_NO_TEXT = "\0token"
"""The context of a segment that is no text: an image, or a special token that the tokenizer does
not find in a text. Other contexts are one character or an added token."""


def split_images(text: str) -> list[str]:
    """Split a text at each ``<image>``; these become segments of their own."""
    return [segment for segment in _IMAGE.split(text) if segment]


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids with which a sample begins: bos, or what ChatGLM has in its place; may be none."""
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    return list(getattr(tokenizer, "prefix_tokens", None) or [])


def bos_and_eos(tokenizer: Tokenizer) -> tuple[str, str]:
    """The texts of ``prefix_ids`` and eos; empty where there is none."""
    prefix = "".join(tokenizer.convert_ids_to_tokens(prefix_ids(tokenizer)))
    return tokenizer.bos_token or prefix, tokenizer.eos_token or ""


def encode_segments(
    tokenizer: Tokenizer, segments: Sequence[str], with_image_token: bool = False
) -> list[list[int]]:
    """Tokenise consecutive segments of one text.

    Args:
        tokenizer: of transformers.
        segments: the text in order; special tokens are recognised, none is added.
        with_image_token: a segment that is ``<image>`` becomes one ``IMAGE_TOKEN_INDEX``; it is no
            left context of the next one.

    Returns:
        The ids of each segment. Joined they are the ids of the joined text, except for tokens that
        would span a boundary.

    Example:
        ``encode_segments(tokenizer, ["USER: hi ASSISTANT:", "Hello.", "</s>"])``
    """
    return SegmentEncoder(tokenizer, with_image_token)([segments])[0]


class SegmentEncoder:
    """``encode_segments`` for many texts: equal segments are tokenised once, all in one batch.

    Args:
        tokenizer: of transformers.
        with_image_token: as for ``encode_segments``.
    """

    def __init__(self, tokenizer: Tokenizer, with_image_token: bool = False) -> None:
        self.tokenizer = tokenizer
        self.with_image_token = with_image_token
        self.bos, self.eos = bos_and_eos(tokenizer)
        self._added = {token for token in tokenizer.get_added_vocab() if token}
        self._last_characters = {token[-1] for token in self._added}
        self._sizes = sorted({len(token) for token in self._added}, reverse=True)
        self._cache: dict[Segment, PackedIds] = {}
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._is_compared = False
        self._special = self._not_in_text()

    def __call__(self, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Tokenise several texts, each given in segments; the ids of each segment."""
        ids, sizes = self.encode(texts)
        segments = iter(np.split(ids, np.cumsum(sizes)))
        return [[next(segments).tolist() for _ in text] for text in texts]

    def encode(self, texts: Sequence[Sequence[str]]) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Tokenise several texts, each given in segments.

        Returns:
            (tokens,) the ids of all segments, concatenated; (segments,) the number of ids of each.
        """
        segments = [segment for text in texts for segment in self._with_context(text)]
        ids = self._ids(dict.fromkeys(segments))
        packed = [ids[segment] for segment in segments]
        sizes = np.array([len(each) for each in packed], dtype=np.int64) // ID_BYTES
        return unpack_ids(b"".join(packed)), sizes

    def _with_context(self, texts: Sequence[str]) -> list[Segment]:
        """The segments of one text with their left contexts."""
        segments: list[Segment] = []
        longest = self._sizes[0] if self._sizes else 1
        before = ""
        for text in texts:
            if self.with_image_token and text == DEFAULT_IMAGE_TOKEN:
                segments.append((_NO_TEXT, text))
                continue
            if text in self._special:
                segments.append((_NO_TEXT, text))
                before = ""
                continue
            segments.append((self._context(before), text))
            before = text if len(text) >= longest else before[-longest:] + text
        return segments

    def _context(self, text: str) -> str:
        """What a text ends in: the longest added token, else the last character."""
        last = text[-1:]
        if last not in self._last_characters:
            return last
        ends = (text[-size:] for size in self._sizes)
        return next((end for end in ends if end in self._added), last)

    def _ids(self, segments: dict[Segment, None]) -> dict[Segment, PackedIds]:
        """The ids of different segments, from the cache or computed together."""
        cache = self._cache
        if len(cache) > CACHED_SEGMENTS:
            cache.clear()
        cache[_NO_TEXT, DEFAULT_IMAGE_TOKEN] = pack_ids([IMAGE_TOKEN_INDEX])
        cache.update({(_NO_TEXT, token): ids for token, ids in self._special.items()})
        ids = {segment: cache[segment] for segment in segments if segment in cache}
        new = [segment for segment in segments if segment not in ids]
        for segment, packed in zip(new, self._encode_after_context(new), strict=True):
            ids[segment] = packed
            if len(segment[1]) <= CACHED_LENGTH:
                cache[segment] = packed
        return ids

    def _not_in_text(self) -> dict[str, PackedIds]:
        """The ids of bos and eos where they are no single token when they occur in a text."""
        eos = self.tokenizer.eos_token_id
        ids = {self.bos: prefix_ids(self.tokenizer), self.eos: [] if eos is None else [eos]}
        return {
            text: pack_ids(own)
            for text, own in ids.items()
            if text and own and not self._is_found(text, pack_ids(own))
        }

    def _is_found(self, token: str, ids: PackedIds) -> bool:
        return token in self._added and self._encode("a" + token) == self._encode("a") + ids

    def _encode_after_context(self, segments: Sequence[Segment]) -> list[PackedIds]:
        """The ids of texts after their left contexts; of the text alone where they merge."""
        contexts = list(dict.fromkeys(context for context, _ in segments))
        ids_of_context = dict(zip(contexts, self._encode_batch(contexts), strict=True))
        found = self._encode_batch([context + text for context, text in segments])
        merged: list[int] = []
        for index, (context, _) in enumerate(segments):
            prefix = ids_of_context[context]
            if not found[index].startswith(prefix):
                merged.append(index)
            found[index] = found[index][len(prefix) :]
        alone = self._encode_batch([segments[index][1] for index in merged])
        for index, ids in zip(merged, alone, strict=True):
            found[index] = ids
        return found

    def _encode_batch(self, texts: Sequence[str]) -> list[PackedIds]:
        """The ids of texts, each on its own, by the fastest interface that gives the right ones."""
        if self._backend is None or not texts:
            return [self._encode(text) for text in texts]
        self._backend.no_padding()
        self._backend.no_truncation()
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ids = [pack_ids(each.ids) for each in encoded]
        if not self._is_compared:  # a tokenizer may do more than its backend
            self._is_compared = len(texts) >= COMPARED
            if any(self._encode(t) != own for t, own in zip(texts[:COMPARED], ids, strict=False)):
                self._backend = None
                return [self._encode(text) for text in texts]
        return ids

    def _encode(self, text: str) -> PackedIds:
        return pack_ids(self.tokenizer.encode(text, add_special_tokens=False))


def unpack_ids(packed: PackedIds) -> Tokens:
    """Token ids from the bytes of int32 numbers."""
    return np.frombuffer(packed, dtype=np.int32)


def pack_ids(ids: Sequence[int]) -> PackedIds:
    """Token ids as the bytes of int32 numbers."""
    return array("i", ids).tobytes()
