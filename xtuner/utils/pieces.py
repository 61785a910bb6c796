"""Tokenising a text in pieces, each as what it is: the continuation of the text before it.

A question and an answer must be tokenised apart, since at generation the question stands alone and
no token may reach across the seam. But tokenised as if nothing stood before it, an answer gets a
leading space from SentencePiece-like tokenizers, which the joined text does not have, and which the
model would learn to say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from xtuner.utils.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX

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
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    encoded = []
    before = ""
    for piece in pieces:
        if with_image_token and piece == DEFAULT_IMAGE_TOKEN:
            encoded.append([IMAGE_TOKEN_INDEX])
            continue
        encoded.append(_continue(tokenizer, _tail(before, added), piece))
        before = (before + piece)[-256:]
    return encoded


def _tail(text: str, added: Sequence[str]) -> str:
    """As much of the end of a text as decides how what follows is tokenised."""
    return next((token for token in added if text.endswith(token)), text[-1:])


def _continue(tokenizer: Any, tail: str, piece: str) -> list[int]:
    alone = _encode(tokenizer, piece)
    if not tail or not piece:
        return alone
    head, both = _encode(tokenizer, tail), _encode(tokenizer, tail + piece)
    return both[len(head) :] if both[: len(head)] == head else alone


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
