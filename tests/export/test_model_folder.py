"""Files beside the weights: which of them an adapter's tokenizer replaces."""

import json
import shutil

import pytest

from tests.helpers.hub_layouts import LAYOUTS, write_tokenizer
from xtuner.export.model_folder import copy_tokenizer, read_adapter_config
from xtuner.export.sidecar_files import write_tokenizer as write_run_tokenizer
from xtuner.model.transformers_models.auto import AutoTokenizer
from xtuner.utils.errors import UserError


def names(folder):
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("family", [*LAYOUTS])
def test_a_hub_familys_tokenizer_moves_as_a_whole(tmp_path, family):
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    write_tokenizer(base, family)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(adapter)
    write_tokenizer(merged, family)

    assert copy_tokenizer(adapter, merged)

    assert names(base) <= names(merged) | {"special_tokens_map.json"}
    reloaded = AutoTokenizer.from_pretrained(merged)
    assert type(reloaded) is type(tokenizer)
    assert reloaded.chat_template == "{{ messages }}"
    assert reloaded.encode("Hello, 你好") == tokenizer.encode("Hello, 你好")


@pytest.mark.parametrize("family", ["internlm2", "qwen", "chatglm3", "baichuan2", "minicpm"])
def test_a_tokenizer_without_vocabulary_leaves_the_bases(tmp_path, family):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    write_tokenizer(merged, family)
    adapter.mkdir()
    (adapter / "tokenizer_config.json").write_bytes((merged / "tokenizer_config.json").read_bytes())
    before = AutoTokenizer.from_pretrained(merged).encode("Hello, 你好")
    assert copy_tokenizer(adapter, merged)
    assert AutoTokenizer.from_pretrained(merged).encode("Hello, 你好") == before


def test_another_vocabulary_takes_the_place_of_the_bases(tmp_path):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    write_tokenizer(merged, "minicpm")
    write_tokenizer(adapter, "internlm2")
    assert copy_tokenizer(adapter, merged)
    assert "tokenizer.json" not in names(merged)
    assert (merged / "tokenizer.model").read_bytes() == (adapter / "tokenizer.model").read_bytes()


def test_without_a_tokenizer_nothing_changes(tmp_path):
    merged = tmp_path / "merged"
    write_tokenizer(merged, "qwen")
    before = names(merged)
    (tmp_path / "adapter").mkdir()
    assert not copy_tokenizer(tmp_path / "adapter", merged)
    assert names(merged) == before


def test_a_special_token_of_the_run_outranks_the_bases_map(tmp_path):
    write_tokenizer(tmp_path / "base", "minicpm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base", eos_token="<AI>")
    shutil.copytree(tmp_path / "base", tmp_path / "exported")
    write_run_tokenizer(tmp_path / "exported", tokenizer, None)
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert reloaded.eos_token == "<AI>"
    assert reloaded.eos_token_id == tokenizer.eos_token_id
    assert reloaded.bos_token == "<s>"


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
def test_an_adapter_with_a_pattern_that_is_none_is_refused(tmp_path, name):
    settings = {"peft_type": "LORA", name: "(q_proj"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="this adapter's config cannot be used"):
        read_adapter_config(tmp_path)
