"""Places of tokens in the text: slow tokenizers of SentencePiece give them as fast ones do."""

from __future__ import annotations

import pytest

from tests.helpers.hub_layouts import TEXTS, write_tokenizer
from tests.helpers.tiny import make_tokenizer
from xtuner.model.transformers_models.auto import AutoTokenizer
from xtuner.tokenization.messages import encode_messages
from xtuner.tokenization.offsets import encode_with_offsets
from xtuner.utils.constants import IGNORE_INDEX

SLOW = ["baichuan", "baichuan2", "chatglm2", "chatglm3"]
MORE = [" a", "  b ", "😀 x", "好<0x0A>", "a\n\n b", ""]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'Q: ' + message['content'] + '\nA: ' }}{% else %}{{ message['content'] + '\n' }}"
    "{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module", params=SLOW)
def slow(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_tokenizer(folder, request.param)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not tokenizer.is_fast
    return tokenizer


@pytest.mark.parametrize("text", TEXTS + MORE)
def test_pieces_of_slow_tokenizers_are_found(slow, text):
    ids, places = encode_with_offsets(slow, text)
    assert ids == slow(text, add_special_tokens=False)["input_ids"]
    assert len(places) == len(ids)
    covered = sorted({place for first, stop in places for place in range(first, stop)})
    assert covered == list(range(len(text)))
    assert [first for first, _ in places] == sorted(first for first, _ in places)


def test_a_fast_tokenizers_own_places_are_taken():
    tokenizer = make_tokenizer()
    encoded = tokenizer(TEXTS[0], add_special_tokens=False, return_offsets_mapping=True)
    found = encode_with_offsets(tokenizer, TEXTS[0])
    assert found == (encoded["input_ids"], encoded["offset_mapping"])


def test_answers_are_trained_with_the_template_of_a_slow_tokenizer(slow):
    slow.chat_template = TEMPLATE
    messages = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "您好！😀"},
    ]
    (sample,) = encode_messages(messages, slow)
    trained = [label for label in sample["labels"] if label != IGNORE_INDEX]
    assert slow.decode(trained).strip() == "您好！😀"


def test_tokens_that_are_not_the_text_are_refused(slow, monkeypatch):
    monkeypatch.setattr(slow, "tokenize", lambda text: ["other"])
    with pytest.raises(ValueError, match="slow tokenizer"):
        encode_with_offsets(slow, "text")
