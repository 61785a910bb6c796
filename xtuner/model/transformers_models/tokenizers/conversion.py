"""Vocabulary files of the hub as backends of the ``tokenizers`` library, with the same ids."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

SPACE = "▁"
"""Stands for a space in the pieces of SentencePiece."""
BPE_MODEL = 2
NORMAL, USER_DEFINED, UNUSED = 1, 4, 5
"""``TrainerSpec.ModelType`` and ``SentencePiece.Type`` of SentencePiece's protobuf."""

Ranked = tuple[str, float]


def from_sentencepiece(
    file: str | Path, names: Mapping[int, str] | None = None, *, split_symbols: bool
) -> Tokenizer:
    """A SentencePiece model as a backend.

    SentencePiece merges the adjacent pair whose piece has the best score, of several the leftmost;
    the ``tokenizers`` library merges by rank. The ids are the same where pieces that overlap have
    different scores, or are ranked as they stand in the text: others are refused.

    Args:
        file: ``tokenizer.model``.
        names: other names for pieces, by id.
        split_symbols: whether user-defined pieces are split off before anything is merged, as
            SentencePiece does, or are pieces like others, as in the hub's fast tokenizers.

    Raises:
        UserError: the model is of a kind whose ids would differ.
    """
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # generated, without types
    proto = messages.ModelProto.FromString(Path(file).read_bytes())
    texts = [piece.piece for piece in proto.pieces]
    for number, name in (names or {}).items():
        if number < len(texts):
            texts[number] = name
    vocabulary = {text: number for number, text in enumerate(texts)}
    merged = {NORMAL} if split_symbols else {NORMAL, USER_DEFINED}
    kept = [piece for piece in proto.pieces if piece.piece in vocabulary]
    pieces = [(piece.piece, piece.score) for piece in kept if piece.type in merged]
    symbols = [piece.piece for piece in kept if piece.type == USER_DEFINED]
    reason = _inexact(proto, pieces, symbols)
    if reason:
        raise UserError(
            tr(
                "the SentencePiece model has no fast tokenizer with the same ids: {reason}.",
                reason=reason,
            ),
            where=Where(file=str(file)),
        )
    backend = Tokenizer(
        BPE(
            vocabulary,
            _merges(pieces, vocabulary),
            unk_token=texts[proto.trainer_spec.unk_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = proto.normalizer_spec.add_dummy_prefix
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", left=1)] if prefix else []),
        ]
    )
    if split_symbols:
        backend.add_tokens([AddedToken(symbol, normalized=False) for symbol in symbols])
    return backend


def from_ranks(file: str | Path, pattern: str, special: Iterable[str]) -> Tokenizer:
    """A file of tiktoken ranks as a backend: byte-level BPE on text in Unicode's form NFC.

    Args:
        file: lines of a token's bytes in Base64 and its rank, which is its id.
        pattern: regular expression of the pieces that text is split into first.
        special: tokens whose ids follow the ranks.
    """
    ranks: dict[bytes, int] = {}
    for line in Path(file).read_bytes().splitlines():
        token, _, rank = line.partition(b" ")
        if rank:
            ranks[base64.b64decode(token)] = int(rank)
    letters = _letters()
    texts = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {texts[token]: rank for token, rank in ranks.items()}
    pieces = [(texts[token], -float(rank)) for token, rank in ranks.items()]
    backend = Tokenizer(BPE(vocabulary, _merges(pieces, vocabulary), ignore_merges=True))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    # normalized: special tokens are found in the text after NFC
    backend.add_tokens([AddedToken(text, special=True, normalized=True) for text in special])
    return backend


def _merges(pieces: Sequence[Ranked], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs that make up each piece, the best scores first.

    Args:
        pieces: that may be merged, with their scores.
        vocabulary: ids, which rank what has the same score.
    """
    ids = {text: vocabulary[text] for text, _ in pieces}
    merges: list[tuple[str, str]] = []
    for text, _ in sorted(pieces, key=lambda piece: (-piece[1], ids[piece[0]])):
        cuts = [
            (left, right, cut)
            for cut in range(1, len(text))
            if (left := ids.get(text[:cut])) is not None
            and (right := ids.get(text[cut:])) is not None
        ]
        merges += [(text[:cut], text[cut:]) for *_, cut in sorted(cuts)]
    return merges


def _inexact(proto: Any, pieces: Sequence[Ranked], symbols: Sequence[str]) -> str | None:
    """Why the ids of a backend would differ from SentencePiece's; None if they do not."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != BPE_MODEL or not trainer.byte_fallback:
        return tr("it is not BPE with byte fallback")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        return tr("it normalizes text")
    if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        return tr("it does not put spaces before words")
    if any(piece.type == UNUSED for piece in proto.pieces):
        return tr("it has unused pieces")
    if any(SPACE in symbol or " " in symbol for symbol in symbols):
        return tr("it has user-defined pieces with spaces")
    ties: dict[float, list[str]] = {}
    for text, score in pieces:
        if len(text) > 1:
            ties.setdefault(score, []).append(text)
    for texts in ties.values():
        for place, first in enumerate(texts):
            for later in texts[place + 1 :]:
                if any(later.endswith(first[:size]) for size in range(1, len(first))):
                    return tr(
                        "the pieces {first!r} and {later!r} overlap and have the same score",
                        first=first,
                        later=later,
                    )
    return None


def _letters() -> list[str]:
    """The character that byte-level BPE writes for each byte.

    As in GPT-2: printable characters of Latin-1 stand for themselves, the other bytes for the
    characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(number) for number in range(0x100, 0x200))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]
