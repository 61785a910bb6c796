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


def encode_messages(
    conversation: Sequence[Mapping[str, Any]], tokenizer: Any, *, max_length: int | None = None
) -> Sample:
    """Tokenise one conversation with the tokenizer's own chat template.

    The text is rendered once; what the template adds for an answer, from the end of the prompt for
    it to its last mark, is trained.

    Args:
        conversation: turns as map functions make them, without a template.
        tokenizer: a fast tokenizer with a chat template.
        max_length: tokens after which the sample is cut; None: never.

    Returns:
        As ``encode_conversation``.

    Raises:
        ValueError: when the template writes an earlier answer differently once more messages
            follow (some leave out its reasoning), so that its place cannot be told.
    """
    messages: list[dict[str, str]] = []
    spans: list[tuple[int, int]] = []
    beginnings: list[str] = []
    for turn in conversation:
        if turn.get("system"):
            messages.append({"role": "system", "content": str(turn["system"])})
        messages.append({"role": "user", "content": str(turn["input"])})
        prompt = _rendered(tokenizer, messages, prompt=True)
        messages.append({"role": "assistant", "content": str(turn["output"])})
        answered = _rendered(tokenizer, messages).rstrip()
        beginnings += [prompt, answered]
        if turn.get("output_with_loss", True):
            spans.append((len(prompt), len(answered)))
    text = _rendered(tokenizer, messages)
    if not all(text.startswith(beginning) for beginning in beginnings):
        raise ValueError(
            "the tokenizer's chat template changes earlier turns when later ones follow; "
            "give such rows one turn each, or use a named template"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    labels = [
        token if any(a <= first and last <= b and first < last for a, b in spans) else IGNORE_INDEX
        for token, (first, last) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def _rendered(tokenizer: Any, messages: list[dict[str, str]], prompt: bool = False) -> str:
    return str(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    )
