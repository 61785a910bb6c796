"""A trained template becomes the tokenizer's chat template, and its stop words the stop tokens."""

from __future__ import annotations

import json

import pytest

from tests.helpers.tiny import make_tokenizer
from xtuner.export.trained_template import (
    reward_token_of,
    set_chat_template,
    template_of,
    tokenizer_of,
    write_stop_tokens,
)
from xtuner.utils.errors import UserError
from xtuner.utils.templates import PROMPT_TEMPLATE

INTERNLM2 = PROMPT_TEMPLATE.internlm2_chat


def generation_config(folder):
    return json.loads((folder / "generation_config.json").read_text("utf-8"))


@pytest.mark.parametrize(("own", "kept"), [([7], [7]), (7, [7]), ([7, 9], [7, 9]), (None, [])])
def test_the_bases_own_eos_ids_are_kept(own, kept, tokenizer, tmp_path):
    settings = {"eos_token_id": own, "temperature": 0.5}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings), "utf-8")
    ids = write_stop_tokens(tmp_path, tokenizer, INTERNLM2)
    written = generation_config(tmp_path)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ids
    assert written["eos_token_id"] == [*ids, *kept]
    assert written["temperature"] == 0.5


def test_an_id_of_both_is_written_once(tokenizer, tmp_path):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}), "utf-8")
    ids = write_stop_tokens(tmp_path, tokenizer, INTERNLM2)
    assert generation_config(tmp_path)["eos_token_id"] == ids


def test_without_a_generation_config_the_tokenizers_ids_are_written(tokenizer, tmp_path):
    ids = write_stop_tokens(tmp_path, tokenizer, INTERNLM2)
    assert generation_config(tmp_path) == {
        "eos_token_id": ids,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def test_the_chat_template_renders_the_trained_prompt():
    tokenizer = make_tokenizer()
    set_chat_template(tokenizer, INTERNLM2)
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith(INTERNLM2["INSTRUCTION"].format(input="Hi"))


def config_with(*arguments: dict) -> dict:
    functions = [dict(type=len, template="auto", template_arguments=each) for each in arguments]
    parts = [dict(type=len, template_map_fn=function) for function in functions]
    return dict(train_dataloader=dict(dataset=dict(type=len, datasets=parts)))


TALK = [{"role": "user", "content": "hi"}]
OWN = "{{ bos_token }}{% if enable_thinking %}T{% else %}N{% endif %}{{ mode }}{{ names }}"


def test_template_arguments_are_part_of_the_exported_chat_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = OWN
    given = dict(enable_thinking=False, mode="a'b", names=["x", None, 1.5])
    built = tokenizer_of({"tokenizer": tokenizer, **config_with(given, given)})
    render = lambda **more: built.apply_chat_template(TALK, tokenize=False, **more)  # noqa: E731
    assert render() == f"{tokenizer.bos_token}Na'b['x', None, 1.5]"
    assert render(enable_thinking=True, mode="c", names="") == f"{tokenizer.bos_token}Tc"


def test_without_template_arguments_the_chat_template_stays():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = OWN
    assert tokenizer_of({"tokenizer": tokenizer, **config_with({}, {})}).chat_template == OWN


def test_different_template_arguments_are_refused(tokenizer):
    with pytest.raises(UserError, match="different template_arguments"):
        tokenizer_of({"tokenizer": tokenizer, **config_with({"a": 1}, {"a": 2})})


def test_the_template_of_a_config():
    dataset = {"type": len, "template_map_fn": {"type": len, "template": "internlm2_chat"}}
    assert template_of({"train_dataloader": {"dataset": dataset}}) == INTERNLM2
    nested = {"datasets": [dataset, dict(dataset)]}
    assert template_of({"train_dataloader": {"dataset": nested}}) == INTERNLM2
    assert template_of({"train_dataset": dataset}) == INTERNLM2
    assert template_of({}) is None


def test_two_templates_in_one_run_are_refused():
    two = [
        {"template_map_fn": {"type": len, "template": name}}
        for name in ("internlm2_chat", "vicuna")
    ]
    with pytest.raises(UserError, match="2 different prompt templates"):
        template_of({"train_dataloader": {"dataset": {"datasets": two}}})


def test_the_reward_token_of_a_config():
    dataset = {"is_reward": True, "reward_token_id": 92527}
    assert reward_token_of({"train_dataloader": {"dataset": dataset}}) == 92527
    dataset["is_reward"] = False
    assert reward_token_of({"train_dataloader": {"dataset": dataset}}) is None
    assert reward_token_of({}) is None
