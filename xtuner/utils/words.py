"""Tokenising word by word, for tokenizers whose tokens never reach across the space before a word.

Words come again and again; looked up, they cost a tenth of what the tokenizer takes. Whether that
gives the tokenizer's own ids is decided from what it is made of: byte-pair encoding, no entry of
the vocabulary that goes on after a character over a space, no rewriting of the text but of single
characters; and it is tried out at the space between any two kinds of characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

Ids = bytes
"""Token ids as int32, so that those of words are put together at the speed of memory."""
Batch = Callable[[Sequence[str]], list[Ids]]

# A space after a visible ASCII character and before an ASCII letter or digit.
_SEAM = re.compile(r"(?<=[!-~])(?= [a-zA-Z0-9])")
_WORD = re.compile(r"[a-zA-Z0-9](?:[^ ]*[!-~])?")
_REACHES_OVER = re.compile("[^\nĠ▁ ][Ġ▁ ]")
_NORMALIZERS = {"NFC", "NFKC", "Replace", "Prepend", "Sequence"}
_PRE_TOKENIZERS = {"ByteLevel", "Split", "Metaspace", "Digits", "Sequence"}
LONGEST, REMEMBERED = 64, 300_000


def goes_word_by_word(tokenizer: Any, batch: Batch) -> bool:
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
    for token in parts["added_tokens"]:
        if token["rstrip"] or token["single_word"] or " " in token["content"]:
            return False
    added = {token["content"] for token in parts["added_tokens"]}
    vocabulary = "\n".join(token for token in model["vocab"] if token not in added)
    return not _REACHES_OVER.search(vocabulary) and _tried_out(batch)


def _types(part: Any) -> set[str]:
    """The kinds that a part of a tokenizer is made of."""
    if part is None:
        return set()
    inner = part.get("normalizers") or part.get("pretokenizers") or []
    return {part["type"]}.union(*(_types(each) for each in inner))


def _tried_out(batch: Batch) -> bool:
    visible = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pairs = [(before, after) for before in visible for after in ("a", "Z", "0")]
    (context,) = batch(["a"])
    words = batch([f"a {after}y" for _, after in pairs])
    heads = batch([f"x{before}" for before, _ in pairs])
    wholes = batch([f"x{before} {after}y" for before, after in pairs])
    return all(
        word[: len(context)] == context and whole == head + word[len(context) :]
        for word, head, whole in zip(words, heads, wholes, strict=True)
    )


class WordCache:
    """The ids of words as they stand after a space, remembered.

    Args:
        tokenizer: one that ``goes_word_by_word``.
        batch: gives the ids of texts that stand alone.
    """

    def __init__(self, tokenizer: Any, batch: Batch) -> None:
        self._batch = batch
        self._known: dict[str, Ids] = {}
        (self._context,) = batch(["a"])
        marks = [
            token["content"]
            for token in json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"]
            if not (token["lstrip"] or token["normalized"])
        ]
        marks.sort(key=len, reverse=True)
        self._marks = re.compile(f"({'|'.join(map(re.escape, marks))})") if marks else None

    def at_marks(self, text: str) -> list[str]:
        """A text cut around the tokens that are found before anything else is."""
        if self._marks is None:
            return [text]
        return [part for part in self._marks.split(text) if part]

    def split(self, text: str) -> list[str]:
        """A text as its first part, and the words after it without the space before each."""
        first, *words = text.split(" ")
        if not words:
            return [text]
        if first and "!" <= first[-1] <= "~":
            known = self._known.__contains__
            if all(map(known, words)) or all(known(w) or _WORD.fullmatch(w) for w in words):
                return [first, *words]
        first, *parts = _SEAM.split(text)
        return [first, *(part[1:] for part in parts)]

    def learn(self, texts: Iterable[Sequence[str]]) -> dict[str, Ids]:
        """Tokenise the words that are new.

        Args:
            texts: as ``split`` gave them.

        Returns:
            The ids of all words, and perhaps more.
        """
        if len(self._known) > REMEMBERED:
            self._known.clear()
        words = set(chain.from_iterable(parts[1:] for parts in texts))
        new = sorted(words.difference(self._known))
        skip = len(self._context)
        ids = [each[skip:] for each in self._batch([f"a {word}" for word in new])]
        found = dict(zip(new, ids, strict=True))
        lasting = {w: i for w, i in found.items() if len(w) <= LONGEST and _WORD.fullmatch(w)}
        self._known |= lasting
        return self._known if len(lasting) == len(found) else self._known | found
