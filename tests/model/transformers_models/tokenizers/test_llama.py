"""Folders whose ``tokenizer_class`` is ``LlamaTokenizer``: the ids of their ``tokenizer.json``."""

from __future__ import annotations

import json

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from tests.helpers.hub_layouts import write_tokenizer
from xtuner.model.transformers_models.auto import AutoTokenizer

TEXTS = [
    " hello",
    "  two",
    " 你好",
    "a",
    "Please\n introduce  yourself. ",
    "▁x",
    " ",
    "1 + 1 = 2",
    "😀",
]
SPECIAL = ["</s> hi", "hi</s> you", "</s>hi", "<s>USER: a</s> b<s>"]


@pytest.fixture(params=["LlamaTokenizer", "LlamaTokenizerFast"])
def folder(request, tmp_path):
    write_tokenizer(tmp_path, "minicpm")
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8")) | {"tokenizer_class": request.param}
    file.write_text(json.dumps(settings), "utf-8")
    return tmp_path


@pytest.mark.parametrize("model_type", [None, "llama", "minicpm", "mistral"])
def test_ids_are_those_of_the_folders_tokenizer_json(folder, model_type):
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    wanted = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS + SPECIAL:
        assert tokenizer.encode(text) == wanted.encode(text).ids, repr(text)
        plain = tokenizer.encode(text, add_special_tokens=False)
        assert plain == wanted.encode(text, add_special_tokens=False).ids, repr(text)


def test_without_tokenizer_json_ids_are_sentencepieces(folder):
    (folder / "tokenizer.json").unlink()
    wanted = SentencePieceProcessor(str(folder / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert tokenizer.encode(text) == [tokenizer.bos_token_id, *wanted.encode(text)], repr(text)


@pytest.mark.parametrize("settings", [{"add_bos_token": False}, {"add_eos_token": True}])
def test_bos_and_eos_are_as_they_are_set(folder, settings):
    tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
    ids = tokenizer.encode("a", add_special_tokens=False)
    bos = [tokenizer.bos_token_id] if settings.get("add_bos_token", True) else []
    eos = [tokenizer.eos_token_id] if settings.get("add_eos_token", False) else []
    assert tokenizer.encode("a") == bos + ids + eos


def test_a_saved_folder_gives_the_same_ids(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.model").is_file()
    for text in TEXTS + SPECIAL:
        assert again.encode(text) == tokenizer.encode(text), repr(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
