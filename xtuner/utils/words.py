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
from typing import Any

Ids = bytes
"""Token ids as int32, so that those of words are put together at the speed of memory."""
Batch = Callable[[Sequence[str]], list[Ids]]

# A space after a visible ASCII character and before an ASCII letter or digit.
_SEAM = re.compile(r"(?<=[!-~])(?= [a-zA-Z0-9])")
_WORD = re.compile(r"[a-zA-Z0-9](?:[^ ]*[!-~])?")
_BEGINS = re.compile("[a-zA-Z0-9]")
_REACHES_OVER = re.compile("[!-~][Ġ▁ ]")
_NORMALIZERS = {"NFC", "NFKC", "Replace", "Prepend", "Sequence"}
_PRE_TOKENIZERS = {"ByteLevel", "Split", "Metaspace", "Digits", "Sequence"}
# Those that may come again: short, and of one line.
_LASTING = re.compile(r"[a-zA-Z0-9](?:[^ \n]{0,38}[!-~])?")
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


class WordCache:
    """The ids of words as they stand after a space, remembered.

    Args:
        tokenizer: one that ``goes_word_by_word``.
        batch: gives the ids of texts that stand alone.
    """

    def __init__(self, tokenizer: Any, batch: Batch) -> None:
        self._batch = batch
        self._known: dict[str, Ids] = {}
        self._new: set[str] = set()
        self._passing: list[str] = []
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
        if text in self._parts:
            return self._parts[text]
        parts = [text] if self._marks is None else self._marks.split(text)
        if len(text) <= LONGEST and len(self._parts) < REMEMBERED:
            self._parts[text] = parts
        return parts

    def split(self, text: str) -> list[str]:
        """A text as its first part, and the words after it without the space before each."""
        first, *words = text.split(" ")
        if not words:
            return [text]
        *inner, last = words
        if first and "!" <= first[-1] <= "~" and (last in self._known or _BEGINS.match(last)):
            strange = set(inner).difference(self._known)
            if all(map(_WORD.fullmatch, strange)):
                strange.add(last)
                self._new |= strange
                return [first, *words]
        first, *parts = _SEAM.split(text)
        words = [part[1:] for part in parts]
        self._new.update(words)
        return [first, *words]

    def learn(self) -> dict[str, Ids]:
        """Tokenise the words that ``split`` gave and that are new; the ids of all words."""
        new = sorted(self._new.difference(self._known))
        self._new.clear()
        skip = len(self._context)
        for word, ids in zip(new, self._batch([f"a {word}" for word in new]), strict=True):
            self._known[word] = ids[skip:]
            if not _LASTING.fullmatch(word):
                self._passing.append(word)
        return self._known

    def forget(self) -> None:
        """Forget what will hardly come again, and all when there is too much; before ``split``."""
        for word in self._passing:
            self._known.pop(word, None)
        self._passing.clear()
        if len(self._known) > REMEMBERED:
            self._known.clear()
