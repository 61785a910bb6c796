"""Tokenizer folders of the hub: saved as they were, with what was changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken

from tests.helpers.hub_layouts import LAYOUTS, write_tokenizer
from xtuner.model.transformers_models.auto import AutoTokenizer
from xtuner.utils.errors import UserError

GOLDEN = Path(__file__).parents[3] / "golden" / "hub_tokenizers"
PUBLISHED = json.loads((GOLDEN / "ids.json").read_text("utf-8"))
TEXTS: list[str] = PUBLISHED["texts"]
OURS = [family for family, layout in LAYOUTS.items() if layout.modules]


@pytest.mark.parametrize("family", OURS)
def test_a_saved_folder_is_the_hubs_folder(tmp_path, family):
    source, target, again = tmp_path / "hub", tmp_path / "saved", tmp_path / "again"
    write_tokenizer(source, family)
    tokenizer = AutoTokenizer.from_pretrained(source)

    tokenizer.save_pretrained(target)
    AutoTokenizer.from_pretrained(target).save_pretrained(again)

    for folder in (target, again):
        written = {file.name: file.read_bytes() for file in folder.iterdir()}
        written.pop("chat_template.jinja", None)  # transformers 5 writes the template twice
        assert written == {file.name: file.read_bytes() for file in source.iterdir()}
    reloaded = AutoTokenizer.from_pretrained(again)
    assert [reloaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("family", ["internlm2", "baichuan2", "chatglm3", "qwen"])
def test_changes_are_saved_and_the_rest_stays(tmp_path, family):
    source, target = tmp_path / "hub", tmp_path / "saved"
    write_tokenizer(source, family)
    names = {} if family == "chatglm3" else {"eos_token": "<|im_end|>"}
    tokenizer = AutoTokenizer.from_pretrained(source, **names)
    before = json.loads((source / "tokenizer_config.json").read_text("utf-8"))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    if family != "qwen":  # its code takes no further tokens
        tokenizer.add_tokens([AddedToken("<tool>", special=True, normalized=False)])

    tokenizer.save_pretrained(target)

    after = json.loads((target / "tokenizer_config.json").read_text("utf-8"))
    added = after.pop("added_tokens_decoder", {})
    assert after == {
        **{key: value for key, value in before.items() if key != "added_tokens_decoder"},
        "chat_template": "{{ messages[0]['content'] }}",
        **names,
    }
    reloaded = AutoTokenizer.from_pretrained(target)
    assert reloaded.chat_template == tokenizer.chat_template
    assert reloaded.eos_token_id == tokenizer.eos_token_id
    for text in (*TEXTS, "x<tool>y", "x<|im_end|>y"):
        assert reloaded.encode(text) == tokenizer.encode(text), repr(text)
    if family != "qwen":
        assert {**added}[str(tokenizer.convert_tokens_to_ids("<tool>"))]["content"] == "<tool>"


def test_added_tokens_after_a_gap_are_refused(tmp_path):
    write_tokenizer(tmp_path, "internvl")
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text("utf-8"))
    del config["added_tokens_decoder"]["654"]
    file.write_text(json.dumps(config), "utf-8")
    with pytest.raises(UserError, match="655"):
        AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["internlm2", "qwen", "baichuan"])
def test_a_folder_without_vocabulary_is_refused(tmp_path, family):
    write_tokenizer(tmp_path, family)
    (tmp_path / LAYOUTS[family].vocab_file).unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.model"):
        AutoTokenizer.from_pretrained(tmp_path)
