"""Token ids with their places in the text, of fast tokenizers and of slow ones."""

from __future__ import annotations

import re
from collections.abc import Sequence

from xtuner.utils.lang import tr
from xtuner.utils.types import Tokenizer

Span = tuple[int, int]
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "▁"
"""Stands for a space in the pieces of SentencePiece."""


def encode_with_offsets(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[Span]]:
    """The ids of a text, without special tokens around it, and where in it each token is.

    Args:
        tokenizer: a fast tokenizer, or a slow one of SentencePiece.
        text: the text.

    Returns:
        Ids, and for each the first character and the one after the last. Bytes of one character
        all have its place.

    Raises:
        ValueError: when the tokens of a slow tokenizer are not the text.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), list(encoded["offset_mapping"])
    tokens = tokenizer.tokenize(text)
    whole = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    surfaces = [token if token in whole else token.replace(SPACE, " ") for token in tokens]
    return list(tokenizer.convert_tokens_to_ids(tokens)), _aligned(surfaces, text)


def _aligned(surfaces: Sequence[str], text: str) -> list[Span]:
    """Where each piece is in the text; a space that SentencePiece put before a word is left out."""
    spans: list[Span] = []
    place, waiting = 0, b""
    for surface in surfaces:
        byte = BYTE.fullmatch(surface)
        if byte is not None and not text.startswith(surface, place):
            waiting += bytes.fromhex(byte[1])
            character = text[place : place + 1]
            spans.append((place, place + 1))
            if waiting == character.encode():
                place, waiting = place + 1, b""
            continue
        if not text.startswith(surface, place):
            surface = surface.removeprefix(" ")
        if waiting or not text.startswith(surface, place):
            raise ValueError(tr("the slow tokenizer's tokens are not the text; use a fast one"))
        spans.append((place, place + len(surface)))
        place += len(surface)
    return spans
