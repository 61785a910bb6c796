"""From turns of text to token ids and labels.

A sample is bos, then for each turn the question with its surroundings (no loss), the answer with
its suffix and eos (loss), and the separator (no loss); bos comes again after a turn that ended in
eos.
Pieces are tokenised as ``utils.pieces`` does, so that chat, which builds the same pieces, sends the
very ids that training saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from xtuner.tokenization.segments import SegmentEncoder, Tokens, split_images
from xtuner.utils.constants import IGNORE_INDEX

Sample = dict[str, list[int]]


def encode_conversation(
    conversation: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    input_ids_with_output: bool = True,
    with_image_token: bool = False,
) -> Sample:
    """Tokenise one conversation whose turns have their template already.

    Args:
        conversation: turns with ``input`` and ``output``; where given ``output_with_loss``,
            ``need_eos_token`` (both true when absent) and ``sep``.
        tokenizer: of transformers.
        max_length: tokens after which the sample is cut; None: never.
        input_ids_with_output: False leaves the answers out, for evaluation by generation.
        with_image_token: each ``<image>`` in a question becomes one ``IMAGE_TOKEN_INDEX``.

    Returns:
        ``input_ids`` and ``labels`` of equal length; labels are ``IGNORE_INDEX`` where there is no
        loss.
    """
    encoder = SegmentEncoder(tokenizer, with_image_token)
    ids, labels, _ = encode_conversations([conversation], encoder, input_ids_with_output)
    return {"input_ids": ids[:max_length].tolist(), "labels": labels[:max_length].tolist()}


def encode_conversations(
    conversations: Iterable[Sequence[Mapping[str, Any]]],
    encoder: SegmentEncoder,
    input_ids_with_output: bool = True,
) -> tuple[Tokens, Tokens, npt.NDArray[np.int64]]:
    """Tokenise many conversations at once.

    Args:
        conversations: each as for ``encode_conversation``.
        encoder: of the tokenizer.
        input_ids_with_output: as for ``encode_conversation``.

    Returns:
        The token ids and the labels of all, one after the other, and how many tokens each has.
    """
    taken = [_pieces(turns, encoder, input_ids_with_output) for turns in conversations]
    ids, sizes = encoder.joined([[text for text, _ in segments] for segments in taken])
    with_loss = np.array([loss for segments in taken for _, loss in segments], dtype=bool)
    labels = np.where(np.repeat(with_loss, sizes), ids, np.int32(IGNORE_INDEX))
    ends = np.concatenate([[0], np.cumsum(sizes)])
    borders = np.cumsum([0, *map(len, taken)])
    return ids, labels, np.diff(ends[borders])


def _pieces(
    conversation: Sequence[Mapping[str, Any]], encoder: SegmentEncoder, with_output: bool
) -> list[tuple[str, bool]]:
    """The texts of a sample in order, each with whether it is trained."""
    bos, eos = encoder.bos, encoder.eos
    segments: list[tuple[str, bool]] = []
    starts = True
    for turn in conversation:
        if starts:
            segments.append((bos, False))
        question = str(turn["input"])
        parts = split_images(question) if encoder.with_image_token else [question]
        segments += [(part, False) for part in parts]
        ends = bool(turn.get("need_eos_token", True))
        if with_output:
            with_loss = bool(turn.get("output_with_loss", True))
            segments += [(str(turn["output"]), with_loss), (eos if ends else "", with_loss)]
            segments.append((str(turn.get("sep", "")), False))
        starts = ends
    return [piece for piece in segments if piece[0]]
