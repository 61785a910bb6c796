"""From turns of text to token ids and labels.

A sample is bos, then for each turn the question with its surroundings (no loss), the answer with
its suffix and eos (loss), and the separator (no loss); bos comes again after a turn that ended in
eos.
Pieces are tokenised as ``utils.pieces`` does, so that chat, which builds the same pieces, sends the
very ids that training saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.pieces import PieceEncoder, ids_of, packed_ids, split_images
from xtuner.utils.words import Ids

Sample = dict[str, list[int]]
_NO_LABEL = packed_ids([IGNORE_INDEX])


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
    encoder = PieceEncoder(tokenizer, with_image_token)
    ((ids, labels),) = encode_conversations([conversation], encoder, input_ids_with_output)
    return {
        "input_ids": ids_of(ids)[:max_length].tolist(),
        "labels": ids_of(labels)[:max_length].tolist(),
    }


def encode_conversations(
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    encoder: PieceEncoder,
    input_ids_with_output: bool = True,
) -> list[tuple[Ids, Ids]]:
    """Tokenise many conversations at once.

    Args:
        conversations: each as for ``encode_conversation``.
        encoder: of the tokenizer.
        input_ids_with_output: as for ``encode_conversation``.

    Returns:
        Of each the token ids and the labels, as the bytes of int32 numbers.
    """
    taken = [_pieces(turns, encoder, input_ids_with_output) for turns in conversations]
    encoded = encoder.packed([[text for text, _ in pieces] for pieces in taken])
    samples = []
    for pieces, parts in zip(taken, encoded, strict=True):
        labels = [
            part if with_loss else _NO_LABEL * (len(part) // len(_NO_LABEL))
            for (_, with_loss), part in zip(pieces, parts, strict=True)
        ]
        samples.append((b"".join(parts), b"".join(labels)))
    return samples


def _pieces(
    conversation: Sequence[Mapping[str, Any]], encoder: PieceEncoder, with_output: bool
) -> list[tuple[str, bool]]:
    """The texts of a sample in order, each with whether it is trained."""
    bos, eos = encoder.bos, encoder.eos
    pieces: list[tuple[str, bool]] = []
    starts = True
    for turn in conversation:
        if starts:
            pieces.append((bos, False))
        question = str(turn["input"])
        parts = split_images(question) if encoder.with_image_token else [question]
        pieces += [(part, False) for part in parts]
        ends = bool(turn.get("need_eos_token", True))
        if with_output:
            with_loss = bool(turn.get("output_with_loss", True))
            pieces += [(str(turn["output"]), with_loss), (eos if ends else "", with_loss)]
            pieces.append((str(turn.get("sep", "")), False))
        starts = ends
    return [piece for piece in pieces if piece[0]]
