"""However many texts are tokenised at once, and by words or not, the ids are the same."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import trainers as trainers_
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny import TEXTS, make_tokenizer
from xtuner.utils.pieces import PieceEncoder, encode_pieces

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
def test_who_goes_word_by_word(name):
    encoder = PieceEncoder(BUILT[name], many=True)
    assert (encoder._words is not None) == (name != "metaspace")  # Unigram weighs whole texts


@pytest.mark.parametrize("name", BUILT)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.lists(pieces, min_size=1, max_size=4), min_size=1, max_size=4))
def test_by_words_and_one_by_one_are_the_same(name, texts):
    tokenizer = BUILT[name]
    alone = [encode_pieces(tokenizer, text) for text in texts]
    encoder = PieceEncoder(tokenizer, many=True)
    assert encoder(texts) == alone
    assert encoder(texts) == alone  # from what it remembers


@pytest.mark.parametrize(
    "token", [AddedToken("<b>", rstrip=True), AddedToken("a b"), AddedToken("b", single_word=True)]
)
def test_tokens_that_take_spaces_are_not_gone_around(token):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([token])
    assert PieceEncoder(tokenizer, many=True)._words is None


def test_a_vocabulary_with_entries_over_a_space_is_seen():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers_.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(["of the of the of the in the in the"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert any("eĠ" in token or "nĠt" in token or "fĠt" in token for token in tokenizer.get_vocab())
    encoder = PieceEncoder(tokenizer, many=True)
    assert encoder._words is None
    assert encoder([["in the of the"]])[0][0] == tokenizer.encode("in the of the")


def test_a_tokenizer_that_does_more_than_its_backend_is_asked_itself():
    class Shouting(PreTrainedTokenizerFast):
        def encode(self, text, **keywords):
            return super().encode(text.upper(), **keywords)

    plain = make_tokenizer()
    shouting = Shouting(tokenizer_object=plain.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    expected = plain.encode("HELLO", add_special_tokens=False)
    assert encode_pieces(shouting, ["hello"]) == [expected]
