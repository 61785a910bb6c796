"""However many texts are tokenised at once, the ids are those of the tokenizer itself."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import trainers as trainers_
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny import TEXTS, make_tokenizer
from xtuner.tokenization import segments
from xtuner.tokenization.segments import SegmentEncoder, encode_segments

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(pre_tokenizer=None, normalizer=None, decoder=None, mark=None):
    tokenizer = Tokenizer(models.BPE(byte_fallback=mark is not None, unk_token="<unk>"))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoder
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = [] if mark else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers_.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([w for text in TEXTS for w in text.split(" ")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def qwen_like():
    split = pre_tokenizers.Split(Regex(QWEN), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    both = pre_tokenizers.Sequence([split, bytes_])
    return trained(both, normalizers.NFC(), decoders.ByteLevel())


def llama2_like():
    marked = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return trained(None, marked, decoders.Metaspace(), mark="▁")


TOKENIZERS = {
    "byte_level": make_tokenizer,
    "bos_eos": lambda: make_tokenizer("bos_eos"),
    "metaspace": lambda: make_tokenizer("metaspace"),
    "qwen_like": qwen_like,
    "llama2_like": llama2_like,
}
BUILT = {name: build() for name, build in TOKENIZERS.items()}
WORDS = [*"ab 0.,-'\n\t é的 \u0301", "  ", " the", "The ", "word.", "don't", "12345", "<|im_end|>"]
WORDS += ["</s>", "capital of", "x\ny", "a.\n\nb", "<|im_start|>user\n"]
words = st.sampled_from(WORDS)
pieces = st.lists(words, min_size=1, max_size=12).map("".join)


@pytest.mark.parametrize("name", BUILT)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.lists(pieces, min_size=1, max_size=4), min_size=1, max_size=4))
def test_a_batch_and_one_by_one_are_the_same(name, texts):
    tokenizer = BUILT[name]
    alone = [encode_segments(tokenizer, text) for text in texts]
    encoder = SegmentEncoder(tokenizer)
    assert encoder(texts) == alone
    assert encoder(texts) == alone  # from what it remembers


def one_by_one(tokenizer, segments):
    """The slow twin: each piece by the tokenizer itself, after the token or character before it."""
    found, text = [], ""
    for piece in segments:
        if piece == "<image>":
            found.append([-200])
            continue
        added = [token for token in tokenizer.get_added_vocab() if text.endswith(token)]
        tail = max(added, key=len, default=text[-1:])
        head = tokenizer.encode(tail, add_special_tokens=False)
        ids = tokenizer.encode(tail + piece, add_special_tokens=False)
        if ids[: len(head)] != head:
            head, ids = [], tokenizer.encode(piece, add_special_tokens=False)
        found.append(ids[len(head) :])
        text += piece
    return found


ODD = [
    "  ",
    "\u00a0",
    "\u3000",
    "\t ",
    " \n",
    "\x00",
    "\x000\x00",
    " 0",
    "a\x00 a",
    " <image",
    "<image>",
]
ODD += [
    "</s> a",
    "a </s>",
    "<|im_",
    "end|>",
    "ﬁ é e\u0301",
    "🙂 a",
    "a 🙂 b",
    "~ 9",
    "! Z",
    "x" * 70,
]
odd = st.lists(st.sampled_from(WORDS + ODD) | st.text(max_size=3), min_size=1, max_size=9)


@pytest.mark.parametrize("name", BUILT)
@settings(max_examples=80, deadline=None)
@given(texts=st.lists(st.lists(odd.map("".join), min_size=1, max_size=5), min_size=1, max_size=3))
def test_odd_characters_special_tokens_and_images(name, texts):
    tokenizer = BUILT[name]
    alone = [one_by_one(tokenizer, text) for text in texts]
    encoder = SegmentEncoder(tokenizer, with_image_token=True)
    assert encoder(texts) == alone
    ids, sizes = encoder.encode(texts)
    assert ids.tolist() == [token for text in alone for piece in text for token in piece]
    assert sizes.tolist() == [len(piece) for text in alone for piece in text]


@pytest.mark.parametrize("name", BUILT)
def test_a_special_token_that_pieces_make_together_is_what_stands_before(name):
    tokenizer = BUILT[name]
    texts = [
        ["a <|im_", "end|>", "word", "."],
        ["<|im_e", "n", "d|>", " word"],
        ["</s", ">the", " 1"],
    ]
    encoder = SegmentEncoder(tokenizer)
    assert encoder(texts) == [one_by_one(tokenizer, text) for text in texts]


def test_nothing_to_tokenise():
    encoder = SegmentEncoder(BUILT["byte_level"], with_image_token=True)
    assert encoder([]) == []
    assert encoder([[], ["", ""]]) == [[], [[], []]]


def test_an_image_is_one_token_also_where_its_mark_is_a_token_of_the_vocabulary():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    text = ["a", "<image>", "", "b"]
    (seen,) = SegmentEncoder(tokenizer, with_image_token=True)([text])
    assert seen[1:3] == [[-200], []]
    (plain,) = SegmentEncoder(tokenizer)([text])
    assert plain[1:3] == [[tokenizer.convert_tokens_to_ids("<image>")], []]


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(segments, "CACHED_SEGMENTS", 3)
    tokenizer = BUILT["byte_level"]
    encoder = SegmentEncoder(tokenizer, with_image_token=True)
    for number in range(9):
        text = [f"a{number}", "<image>", "b"]
        assert encoder([text]) == [one_by_one(tokenizer, text)]
        assert len(encoder._cache) <= 3 + 4


def test_a_tokenizer_that_does_more_than_its_backend_is_asked_itself():
    class Shouting(PreTrainedTokenizerFast):
        def encode(self, text, **keywords):
            return super().encode(text.upper(), **keywords)

    plain = make_tokenizer()
    shouting = Shouting(tokenizer_object=plain.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    expected = plain.encode("HELLO", add_special_tokens=False)
    assert encode_segments(shouting, ["hello"]) == [expected]
