"""Tokenising word by word, for tokenizers whose tokens never reach across the space before a word.

Words come again and again; looked up, they cost a tenth of what the tokenizer takes. Whether that
gives the tokenizer's own ids is decided from what it is made of: byte-pair encoding, no entry of
the vocabulary that goes on after a character over a space, no rewriting of the text but of single
characters; and it is tried out at the space between any two kinds of characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ids = bytes
"""Token ids as int32, so that those of words are put together at the speed of memory."""
Batch = Callable[[Sequence[str]], list[Ids]]

# By the code of an ASCII character.
_VISIBLE = np.array([ord("!") <= code <= ord("~") for code in range(256)])
_LETTER = np.array([code < 128 and chr(code).isalnum() for code in range(256)])
_REACHES_OVER = re.compile("[!-~][Ġ▁ ]")
_NORMALIZERS = {"NFC", "NFKC", "Replace", "Prepend", "Sequence"}
_PRE_TOKENIZERS = {"ByteLevel", "Split", "Metaspace", "Digits", "Sequence"}
_LASTING = re.compile(r" [a-zA-Z0-9](?:[^ \n]{0,38}[!-~])?\n?")
SHORT, REMEMBERED = 64, 300_000
"""Characters of texts that are remembered, and how many are."""


def is_word_separable(tokenizer: Any, batch: Batch) -> bool:
    """Whether a tokenizer's ids of a text are those of its words, put together.

    Args:
        tokenizer: of transformers.
        batch: gives the ids of texts that stand alone.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model.get("type") != "BPE" or model.get("dropout"):
        return False
    if not _types(parts["normalizer"]) <= _NORMALIZERS:
        return False
    if not _types(parts["pre_tokenizer"]) <= _PRE_TOKENIZERS:
        return False
    if not all(map(_keeps_to_itself, parts["added_tokens"])):
        return False
    added = {token["content"] for token in parts["added_tokens"]}
    vocabulary = "\n".join(token for token in model["vocab"] if token not in added)
    return not _REACHES_OVER.search(vocabulary) and _tried_out(batch)


def _keeps_to_itself(token: dict[str, Any]) -> bool:
    """Whether an added token takes no space that a word may stand after or before."""
    text = token["content"]
    takes_spaces = (
        token["rstrip"] or token["single_word"] or (token["lstrip"] and text[0].isalnum())
    )
    return not takes_spaces and " " not in text


def _types(part: Any) -> set[str]:
    """The kinds that a part of a tokenizer is made of."""
    if part is None:
        return set()
    if part["type"] == "Replace" and part["pattern"] != {"String": " "}:
        return {"Replace another"}
    inner = part.get("normalizers") or part.get("pretokenizers") or []
    return {part["type"]}.union(*(_types(each) for each in inner))


def _tried_out(batch: Batch) -> bool:
    """Whether a word after a space has the same ids whatever stands before the space."""
    visible = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pairs = [(before, after) for before in visible for after in ("a", "Z", "0")]
    (context,) = batch(["a"])
    words = batch([f"a {after}y" for _, after in pairs])
    starts = batch([f"x{before}" for before, _ in pairs])
    wholes = batch([f"x{before} {after}y" for before, after in pairs])
    return all(
        word.startswith(context) and whole == start + word[len(context) :]
        for word, start, whole in zip(words, starts, wholes, strict=True)
    )


class Words:
    """Cuts texts where the ids of what follows do not depend on what stands before.

    Args:
        tokenizer: one that ``is_word_separable``.
        batch: gives the ids of texts that stand alone.
    """

    def __init__(self, tokenizer: Any, batch: Batch) -> None:
        self._batch = batch
        (self._context,) = batch(["a"])
        marks = [
            token["content"]
            for token in json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"]
            if not (token["lstrip"] or token["normalized"])
        ]
        marks.sort(key=len, reverse=True)
        self._marks = re.compile(f"({'|'.join(map(re.escape, marks))})") if marks else None
        self._parts: dict[str, list[str]] = {}

    def parts(self, text: str) -> list[str]:
        """A text cut around the tokens that are found before anything else is."""
        short = len(text) <= SHORT
        if short and text in self._parts:
            return self._parts[text]
        parts = [text] if self._marks is None else self._marks.split(text)
        parts = [part for part in parts if part]
        if short and len(self._parts) < REMEMBERED:
            self._parts[text] = parts
        return parts

    def ids(self, words: Sequence[str]) -> list[Ids]:
        """The ids of words, each given with the space before it."""
        skip = len(self._context)
        return [ids[skip:] for ids in self._batch([f"a{word}" for word in words])]


class Cut(NamedTuple):
    """Texts cut into words.

    Attributes:
        words: each different one, once. All but the first of a text begin with their space.
        numbers: (words of all texts,) which of ``words`` they are, one after the other.
        starts: (texts + 1,) where in ``numbers`` each text begins, and the last one ends.
    """

    words: list[str]
    numbers: npt.NDArray[np.integer]
    starts: npt.NDArray[np.integer]


def cut(texts: Sequence[str]) -> Cut:
    """Cut texts at every seam: a space after a visible ASCII character, before a letter or digit.

    Arrow holds the texts one after the other as UTF-8, in which no byte of another character is
    one of these; so the seams are found in the bytes, and the words are not copied to tell them
    apart.

    Args:
        texts: none of them empty, and none beginning with a letter or digit, so that there is no
            seam between two.
    """
    import pyarrow as pa

    _, offsets, characters = pa.array(texts, pa.large_string()).buffers()
    borders = np.frombuffer(offsets, np.int64, len(texts) + 1)
    codes = np.frombuffer(characters, np.uint8, borders[-1])
    spaces = np.flatnonzero(codes == ord(" "))
    seams = _VISIBLE[codes.take(spaces - 1, mode="clip")]
    seams &= _LETTER[codes.take(spaces + 1, mode="clip")]
    places = np.sort(np.concatenate([borders, spaces[seams]]), kind="stable")
    words = pa.LargeStringArray.from_buffers(len(places) - 1, pa.py_buffer(places), characters)
    told_apart = words.dictionary_encode()
    numbers = told_apart.indices.to_numpy()
    return Cut(told_apart.dictionary.to_pylist(), numbers, np.searchsorted(places, borders))


def lasts(word: str) -> bool:
    """Whether a word, given with its space, may come again: a short one, and of one line."""
    return bool(_LASTING.fullmatch(word))
