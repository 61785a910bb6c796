"""However many texts are tokenised at once, and by words or not, the ids are the same."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import trainers as trainers_
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny import TEXTS, make_tokenizer
from xtuner.tokenization.segments import SegmentEncoder, encode_segments
from xtuner.tokenization.word_cache import cut

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
segments = st.lists(words, min_size=1, max_size=12).map("".join)


@pytest.mark.parametrize("name", BUILT)
def test_who_goes_word_by_word(name):
    encoder = SegmentEncoder(BUILT[name], many=True)
    assert (encoder._words is not None) == (name != "metaspace")  # Unigram weighs whole texts


@pytest.mark.parametrize("name", BUILT)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.lists(segments, min_size=1, max_size=4), min_size=1, max_size=4))
def test_by_words_and_one_by_one_are_the_same(name, texts):
    tokenizer = BUILT[name]
    alone = [encode_segments(tokenizer, text) for text in texts]
    encoder = SegmentEncoder(tokenizer, many=True)
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
def test_odd_characters_special_tokens_and_images_by_words(name, texts):
    tokenizer = BUILT[name]
    alone = [one_by_one(tokenizer, text) for text in texts]
    encoder = SegmentEncoder(tokenizer, with_image_token=True, many=True)
    assert encoder(texts) == alone
    ids, sizes = encoder.joined(texts)
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
    encoder = SegmentEncoder(tokenizer, many=True)
    assert encoder(texts) == [one_by_one(tokenizer, text) for text in texts]


def test_nothing_to_tokenise():
    for many in (False, True):
        encoder = SegmentEncoder(BUILT["byte_level"], many=many)
        assert encoder([]) == []
        assert encoder([[], ["", ""]]) == [[], [[], []]]


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(odd.map("".join).map("|".__add__), min_size=1, max_size=5))
def test_texts_are_cut_where_the_pattern_says(texts):
    seam = re.compile(r"(?<=[!-~])(?= [a-zA-Z0-9])")
    words, numbers, starts = cut(texts)
    assert len(set(words)) == len(words)
    found = [words[number] for number in numbers]
    assert [found[a:b] for a, b in itertools.pairwise(starts)] == [seam.split(t) for t in texts]


@pytest.mark.parametrize(
    "token", [AddedToken("<b>", rstrip=True), AddedToken("a b"), AddedToken("b", single_word=True)]
)
def test_tokens_that_take_spaces_are_not_gone_around(token):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([token])
    assert SegmentEncoder(tokenizer, many=True)._words is None


def test_a_vocabulary_with_entries_over_a_space_is_seen():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers_.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(["of the of the of the in the in the"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert any("eĠ" in token or "nĠt" in token or "fĠt" in token for token in tokenizer.get_vocab())
    encoder = SegmentEncoder(tokenizer, many=True)
    assert encoder._words is None
    assert encoder([["in the of the"]])[0][0] == tokenizer.encode("in the of the")


def test_a_tokenizer_that_does_more_than_its_backend_is_asked_itself():
    class Shouting(PreTrainedTokenizerFast):
        def encode(self, text, **keywords):
            return super().encode(text.upper(), **keywords)

    plain = make_tokenizer()
    shouting = Shouting(tokenizer_object=plain.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    expected = plain.encode("HELLO", add_special_tokens=False)
    assert encode_segments(shouting, ["hello"]) == [expected]
