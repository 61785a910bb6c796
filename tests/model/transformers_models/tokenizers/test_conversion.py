"""Vocabulary files of the hub as fast tokenizers: the same ids, or refused."""

from __future__ import annotations

import random

import pytest

from tests.helpers.hub_layouts import USER_DEFINED, write_tokenizer
from xtuner.model.transformers_models.auto import AutoTokenizer
from xtuner.model.transformers_models.tokenizers.conversion import from_sentencepiece
from xtuner.utils.errors import UserError


@pytest.mark.parametrize("family", ["internlm", "internlm3", "internvl"])
def test_converted_sentencepiece_gives_sentencepieces_ids(tmp_path, family):
    import sentencepiece

    write_tokenizer(tmp_path, family)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    draw = random.Random(0)
    parts = [
        *"ab  \t\n（他。的é\u3000=-.|",
        "▁",
        "——",
        "the",
        "return",
        "他们",
        "😀",
        "<0x0A>",
        "<eoh>",
    ]
    for _ in range(500):
        text = "".join(draw.choices(parts, k=draw.randint(1, 30)))
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text), repr(
            text
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda proto: proto.pieces.add(piece="▁a|b", score=0.0, type=USER_DEFINED), "with spaces"),
        (lambda proto: setattr(proto.normalizer_spec, "remove_extra_whitespaces", True), "normal"),
        (lambda proto: setattr(proto.trainer_spec, "model_type", 1), "byte fallback"),
        (lambda proto: setattr(proto.pieces[600], "type", 5), "unused"),
    ],
)
def test_what_has_no_equal_ids_is_refused(tmp_path, change, reason):
    from sentencepiece import sentencepiece_model_pb2

    write_tokenizer(tmp_path, "internlm")
    file = tmp_path / "tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    change(proto)
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match=reason) as error:
        from_sentencepiece(file, split_symbols=True)
    assert str(file) in str(error.value.where)


@pytest.mark.parametrize(("first", "refused"), [("cb", True), ("bc", False)])
def test_pieces_of_one_score_that_overlap(tmp_path, first, refused):
    """Of "cb" and "bc" SentencePiece merges the left one of a text, whichever it is."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    write_tokenizer(tmp_path, "internlm")
    file = tmp_path / "tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    for piece in (first, "ax" if not refused else "bc", *"~`"):
        proto.pieces.add(piece=piece, score=9.0, type=1)
    file.write_bytes(proto.SerializeToString())
    if refused:
        with pytest.raises(UserError, match="overlap"):
            from_sentencepiece(file, split_symbols=True)
        return
    backend = from_sentencepiece(file, split_symbols=True)
    reference = SentencePieceProcessor(str(file))
    for text in ("abcbcb", "cbcbc", "axbcaxx"):
        assert backend.encode(text).ids == reference.encode(text)
