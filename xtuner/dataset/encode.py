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
from xtuner.utils.pieces import encode_pieces, split_images

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
    pieces: list[str] = []
    trained: list[bool] = []

    def add(text: str, with_loss: bool) -> None:
        if text:
            pieces.append(text)
            trained.append(with_loss)

    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    starts = True
    for turn in conversation:
        if starts:
            add(bos, False)
        question = str(turn["input"])
        for part in split_images(question) if with_image_token else [question]:
            add(part, False)
        ends = bool(turn.get("need_eos_token", True))
        if input_ids_with_output:
            with_loss = bool(turn.get("output_with_loss", True))
            add(str(turn["output"]), with_loss)
            if ends:
                add(eos, with_loss)
            add(str(turn.get("sep", "")), False)
        starts = ends
    ids: list[int] = []
    labels: list[int] = []
    encoded = encode_pieces(tokenizer, pieces, with_image_token)
    for piece, with_loss in zip(encoded, trained, strict=True):
        ids += piece
        labels += piece if with_loss else [IGNORE_INDEX] * len(piece)
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}
