"""What a dataset refuses when it is built is found in the config, wherever the dataset stands."""

from __future__ import annotations

import pytest

from tests.config.check.rules import findings, keys
from xtuner.config.check import datasets
from xtuner.config.check.calls import unknown_template

MORE = """
from xtuner.dataset import ConcatDataset, LLaVADataset
from xtuner.dataset.preference_dataset import build_preference_dataset
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("train_dataloader = dict(dataset=dict({ok}, bad_rows='x'))", "dataset.bad_rows"),
        ("val_dataloader = dict(dataset=dict({ok}, seed=0.5))", "dataset.seed"),
        ("train_dataloader = dict(dataset=dict(type=ConcatDataset, datasets=[dict({ok}), "
         "dict({ok}, part='x')]))", "dataset.datasets.1.part"),
        ("train_dataloader = dict(dataset=dict(type=build_preference_dataset, dataset=dict(), "
         "tokenizer=0, max_length=8, is_reward=True, reward_token_id=3))", "dataset.is_reward"),
        ("train_dataloader = dict(dataset=dict(type=build_preference_dataset, dataset=dict(), "
         "tokenizer=dict(), max_length=8, is_dpo=False, is_reward=True))", "dataset"),
        ("train_dataloader = dict(dataset=dict(type=LLaVADataset, image_folder='', "
         "image_processor=None))", "dataset"),
        ("train_dataloader = dict(dataset=dict(type=process_hf_dataset))", "dataset"),
        ("train_dataloader = dict(dataset=dict({ok}, max_length='8'))", None),  # XT0326
        ("train_dataloader = dict(dataset=dict({ok}, dataset_map_fn=alpaca_map_fn))", None),
    ],
)  # fmt: skip
def test_settings(text, found):
    text = text.replace("{ok}", "type=process_hf_dataset, dataset=dict(), max_length=8")
    text = text.replace("max_length=8, max_length", "max_length")
    prefix = text.partition(" ")[0]
    expected = set() if found is None else {f"{prefix}.{found}"}
    assert set(keys(datasets.refused_settings, MORE + text)) == expected


FUNCTION = "fn = dict(type=template_map_fn_factory, template={}, template_arguments={})"


@pytest.mark.parametrize(
    ("template", "arguments", "is_wrong"),
    [
        ("PROMPT_TEMPLATE.qwen_chat", "dict(enable_thinking=False)", True),
        ("'qwen_chat'", "dict(enable_thinking=False)", True),
        ("dict(INSTRUCTION='{input}')", "dict(a=1)", True),
        ("PROMPT_TEMPLATE.auto", "dict(enable_thinking=False)", False),
        ("'auto'", "dict(enable_thinking=False)", False),
        ("'tokenizer'", "dict(enable_thinking=False)", False),
        ("PROMPT_TEMPLATE.qwen_chat", "None", False),
        ("PROMPT_TEMPLATE.qwen_chat", "{}", False),
        ("PROMPT_TEMPLATE.auto", "'enable_thinking'", True),
    ],
)
def test_arguments_of_templates(template, arguments, is_wrong):
    found = keys(datasets.arguments_of_a_fixed_template, FUNCTION.format(template, arguments))
    assert found == (["fn.template_arguments"] if is_wrong else [])
    hook = f"hook = dict(type=EvaluateChatHook, prompt_template={template}, "
    found = keys(datasets.arguments_of_a_fixed_template, f"{hook}template_arguments={arguments})")
    assert found == (["hook.template_arguments"] if is_wrong else [])


@pytest.mark.parametrize(
    ("loader", "found"),
    [
        ("path='json', data_files='a.csv'", ("path", "use path='csv'.")),
        ("path='json', data_files=['a.json', 'b.JSONL.gz', 'c.parquet']", ("path", "'parquet'.")),
        ("path='csv', data_files=dict(train='data/*.tsv', test='t.txt')", ("path", "'text'.")),
        ("path='json'", ("", "data_files=")),
        ("path='json', data_files={}", ("", "data_files=")),
        ("path='json', data_files=[None, 3]", ("data_files", "data_files=")),
        ("path='jsonl', data_files='a.jsonl'", ("path", "use path='json'.")),
        ("path='txt', data_files='a.txt'", ("path", "use path='text'.")),
        ("path='json', data_files='a', split='val'", ("split", "there are: train")),
        ("path='json', data_files=dict(a='a', b='b'), split='a+c[:5]'", ("split", "are: a, b")),
        ("path='json', data_files='a', split='train[5]'", ("split", "train[:100]")),
        ("path='json', data_files='a', split=''", ("split", "train[:100]")),
        ("path='json', data_files=dict(a='a')", ("data_files", "there are: a")),
        ("path='json', data_files=dict(a='a', b='b'), split='a[-5:]+b[5%:]'", None),
        ("path='json', data_files=dict(train='a', test='b')", None),
        ("path='json', data_dir='folder'", None),
        ("path='org/name', data_files='a.csv', split='other'", None),
        ("path='org/name', split='train[:5'", None),
        ("path='csv', data_files='https://x.org/a.csv'", None),
        ("path='json', data_files='no_suffix'", None),
    ],
)
def test_loaders(loader, found):
    text = "d = dict(type=process_hf_dataset, dataset=dict(type=load_dataset, {}))"
    wrong = findings(datasets.files_of_another_loader, text.format(loader))
    if found is None:
        assert not wrong
        return
    key, hint = found
    assert {each.key for each in wrong} == {f"d.dataset.{key}".rstrip(".")}
    assert hint in wrong[0].hint


def test_a_loader_that_no_builder_here_reads_may_have_any_splits():
    text = "d = dict(type=load_dataset, path='json', data_files=dict(x='a.json'))"
    assert not findings(datasets.files_of_another_loader, text)
    text = "d = dict(type=process_hf_dataset, split='x', dataset=" + text[4:] + ")"
    assert not findings(datasets.files_of_another_loader, text)
    assert keys(datasets.files_of_another_loader, text.replace("'x',", "'y',")) == ["d.split"]


@pytest.mark.parametrize(
    ("value", "is_wrong"),
    [
        ("'alpaca_map_fn'", False),
        ("'xtuner.dataset.map_fns.alpaca_map_fn'", False),
        ("'my_module.my_map_fn'", False),
        ("None", False),
        ("alpaca_map_fn", False),
        ("'alpaca'", True),
        ("'alpacca_map_fn'", True),
        ("''", True),
        ("1", True),
        ("True", True),
        ("[alpaca_map_fn]", True),
    ],
)
def test_map_functions_by_name(value, is_wrong):
    text = f"d = dict(type=process_hf_dataset, dataset_map_fn={value})"
    assert keys(datasets.unknown_map_function, text) == (["d.dataset_map_fn"] if is_wrong else [])
    text = f"custom_imports = dict(imports=['mine'])\n{text}"  # it may register functions
    is_wrong = is_wrong and not value.startswith("'")
    assert keys(datasets.unknown_map_function, text) == (["d.dataset_map_fn"] if is_wrong else [])


@pytest.mark.parametrize(
    ("value", "is_wrong"),
    [
        ("'qwen_chat'", False),
        ("'auto'", False),
        ("'xtuner.utils.PROMPT_TEMPLATE.qwen_chat'", False),
        ("'mine.PROMPT_TEMPLATE.own'", False),
        ("dict(INSTRUCTION='{input}')", False),
        ("PROMPT_TEMPLATE.qwen_chat", False),
        ("'qwen'", True),
        ("'xtuner.utils.PROMPT_TEMPLATE.qwen'", True),
        ("5", True),
        ("None", True),
    ],
)
def test_templates_by_name(value, is_wrong):
    text = f"fn = dict(type=template_map_fn_factory, template={value})"
    assert keys(unknown_template, text) == (["fn.template"] if is_wrong else [])
    text = f"hook = dict(type=EvaluateChatHook, prompt_template={value})"
    is_wrong = is_wrong and value != "None"  # the question as it is
    assert keys(unknown_template, text) == (["hook.prompt_template"] if is_wrong else [])
