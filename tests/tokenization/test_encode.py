"""A conversation as tokens: where bos and eos stand, and which tokens are trained."""

import pytest

from tests.helpers.tiny import make_tokenizer
from xtuner.dataset.map_fns import openai_map_fn, template_map_fn_factory
from xtuner.tokenization.encode import encode_conversation
from xtuner.utils import PROMPT_TEMPLATE

TOKENIZER = make_tokenizer()
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def expected(*parts):
    """Ids and labels of parts, each its ids and whether they are trained."""
    tokens = [token for part, _ in parts for token in part]
    labels = [token if trained else -100 for part, trained in parts for token in part]
    return {"input_ids": tokens, "labels": labels}


def test_an_answer_without_loss_has_an_eos_without_loss():
    turns = [
        {"input": "a", "output": "b", "output_with_loss": False},
        {"input": "c", "output": "d"},
    ]
    assert encode_conversation(turns, TOKENIZER) == expected(
        ([BOS], False), (ids("a"), False), (ids("b"), False), ([EOS], False),
        ([BOS], False), (ids("c"), False), (ids("d"), True), ([EOS], True),
    )  # fmt: skip


def test_bos_comes_again_after_an_eos_and_only_there():
    turns = [
        {"input": "a", "output": "b", "need_eos_token": False, "sep": "1"},
        {"input": "c", "output": "d", "need_eos_token": True, "sep": "2"},
        {"input": "a", "output": "b"},
    ]
    assert encode_conversation(turns, TOKENIZER) == expected(
        ([BOS], False), (ids("a"), False), (ids("b"), True), (ids("1"), False),
        (ids("c"), False), (ids("d"), True), ([EOS], True), (ids("2"), False),
        ([BOS], False), (ids("a"), False), (ids("b"), True), ([EOS], True),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["output_with_loss", "need_eos_token", "sep", "system"])
@pytest.mark.parametrize("template", [None, "qwen_chat", "internlm2_chat", "llama2_chat"])
def test_none_means_not_given(name, template):
    """Arrow fills in None where only other rows have a field."""
    turns = [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]
    filled = [{**turn, name: None} for turn in turns]
    if template:
        add = template_map_fn_factory(PROMPT_TEMPLATE[template])
        turns, filled = (add({"conversation": each})["conversation"] for each in (turns, filled))
    assert encode_conversation(filled, TOKENIZER) == encode_conversation(turns, TOKENIZER)


def test_a_text_that_is_none_is_no_text():
    turns = [{"input": None, "output": "b", "sep": None}]
    assert encode_conversation(turns, TOKENIZER) == encode_conversation(
        [{"input": "", "output": "b"}], TOKENIZER
    )


def test_the_answers_are_left_out_for_generation():
    turns = [{"input": "a", "output": "b", "sep": "c"}]
    made = encode_conversation(turns, TOKENIZER, input_ids_with_output=False)
    assert made == expected(([BOS], False), (ids("a"), False))


def test_content_in_parts_is_its_text():
    def message(role, *texts):
        return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}

    row = {"messages": [message("user", "2", "+2?"), message("assistant", "Four.")]}
    (turn,) = openai_map_fn(row)["conversation"]
    assert (turn["input"], turn["output"]) == ("2+2?", "Four.")
    row["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": "x"}})
    with pytest.raises(ValueError, match="'image_url'"):
        openai_map_fn(row)
