"""From turns of text to token ids and labels.

A sample is bos, then for each turn the question with its template (no loss), the answer with its
suffix and eos (loss), and the separator (no loss); bos is repeated after a turn that ended in eos.
Segments are tokenised as in ``segments``, so that chat, which builds the same segments, sends the
very ids that training saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from xtuner.tokenization.content import is_on
from xtuner.tokenization.segments import SegmentEncoder, Tokens, split_images
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.types import Tokenizer

Turn = Mapping[str, Any]
Sample = dict[str, list[int]]


def encode_conversation(
    conversation: Sequence[Turn],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    input_ids_with_output: bool = True,
    with_image_token: bool = False,
) -> Sample:
    """Tokenise one conversation whose turns have their template already.

    Args:
        conversation: turns with ``input`` and ``output``; where given ``output_with_loss``,
            ``need_eos_token`` (both true when absent or None) and ``sep``.
        tokenizer: of transformers.
        max_length: the sample is truncated to so many tokens; None: never.
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
    conversations: Iterable[Sequence[Turn]],
    encoder: SegmentEncoder,
    input_ids_with_output: bool = True,
) -> tuple[Tokens, Tokens, npt.NDArray[np.int64]]:
    """Tokenise many conversations in one batch.

    Args:
        conversations: each as for ``encode_conversation``.
        encoder: of the tokenizer.
        input_ids_with_output: as for ``encode_conversation``.

    Returns:
        (tokens,) the ids and the labels of all, concatenated; (conversations,) the number of tokens
        of each.
    """
    samples = [_segments(turns, encoder, input_ids_with_output) for turns in conversations]
    ids, sizes = encoder.encode([[text for text, _ in segments] for segments in samples])
    with_loss = np.array([loss for segments in samples for _, loss in segments], dtype=bool)
    labels = np.where(np.repeat(with_loss, sizes), ids, np.int32(IGNORE_INDEX))
    ends = np.concatenate([[0], np.cumsum(sizes)])
    offsets = np.cumsum([0, *map(len, samples)])
    return ids, labels, np.diff(ends[offsets])


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _segments(
    conversation: Sequence[Turn], encoder: SegmentEncoder, with_output: bool
) -> list[tuple[str, bool]]:
    """The texts of a sample in order, each with whether it is trained."""
    segments: list[tuple[str, bool]] = []
    needs_bos = True
    for turn in conversation:
        if needs_bos:
            segments.append((encoder.bos, False))
        question = _text(turn.get("input"))
        parts = split_images(question) if encoder.with_image_token else [question]
        segments += [(part, False) for part in parts]
        ends_in_eos = is_on(turn, "need_eos_token")
        if with_output:
            with_loss = is_on(turn, "output_with_loss")
            eos = encoder.eos if ends_in_eos else ""
            segments += [(_text(turn["output"]), with_loss), (eos, with_loss)]
            segments.append((_text(turn.get("sep")), False))
        needs_bos = ends_in_eos
    return [segment for segment in segments if segment[0]]
