"""Rules about settings that must fit each other."""

from __future__ import annotations

import json

import pytest

from tests.config.check.rules import findings, keys
from xtuner.config.check import training

DATASET = "train_dataset = dict(type=process_hf_dataset, {})\n"


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ("pack_to_max_length=True", True),
        ("remove_unused_columns=False", True),
        ("pack_to_max_length=True, remove_unused_columns=True", False),
        ("pack_to_max_length=False", False),
    ],
)
def test_packing_keeps_no_columns(settings, wrong):
    assert bool(keys(training.pack_keeps_columns, DATASET.format(settings))) is wrong


def test_packed_rows_that_are_joined():
    text = "model = dict(type={}, use_varlen_attn=True)\ntrain_dataloader = dict(batch_size={})\n"
    rule = training.varlen_joins_rows
    assert keys(rule, text.format("SupervisedFinetune", 2)) == ["train_dataloader.batch_size"]
    assert not keys(rule, text.format("SupervisedFinetune", 1))
    assert not keys(rule, text.format("DPO", 2))


def test_use_varlen_attn_must_agree():
    model = "model = dict(type=SupervisedFinetune, use_varlen_attn=True)\n"
    rule = training.varlen_disagrees
    assert keys(rule, model + DATASET.format("use_varlen_attn=False"))
    assert not keys(rule, model + DATASET.format("use_varlen_attn=True"))
    collate = "train_dataloader = dict(collate_fn=dict(use_varlen_attn=False))\n"
    assert keys(rule, model + collate) == ["train_dataloader.collate_fn.use_varlen_attn"]
    validation = "val_dataset = dict(type=process_hf_dataset, use_varlen_attn=False)\n"
    assert not keys(rule, model + validation)


@pytest.mark.parametrize(("world", "wrong"), [("6", True), ("8", False), ("", False)])
def test_sequence_parallel_size(monkeypatch, world, wrong):
    monkeypatch.setenv("WORLD_SIZE", world)
    assert (
        bool(keys(training.sequence_parallel_divides_world, "sequence_parallel_size = 4")) is wrong
    )


def test_saving_later_than_the_end():
    text = "train_cfg = dict(max_iters={})\ndefault_hooks = dict(checkpoint=dict(interval=500))\n"
    assert keys(training.saves_only_at_the_end, text.format(499))
    assert not keys(training.saves_only_at_the_end, text.format(500))


@pytest.mark.parametrize(
    ("scheduler", "wrong"),
    [
        ("type=LinearLR, end=4", True),
        ("type=LinearLR, end=3", False),
        ("type=LinearLR, by_epoch=False, end=900", False),  # no max_iters to compare with
        ("type=CosineAnnealingLR, end=4", False),
    ],
)
def test_warmup(scheduler, wrong):
    text = f"train_cfg = dict(max_epochs=3)\nparam_scheduler = [dict({scheduler})]\n"
    assert bool(keys(training.warmup_outlasts_training, text)) is wrong
    alone = f"train_cfg = dict(max_epochs=3)\nparam_scheduler = dict({scheduler})\n"
    assert bool(keys(training.warmup_outlasts_training, alone)) is wrong


@pytest.mark.parametrize(
    ("model", "template", "wrong"),
    [
        ("internlm/internlm2_5-7b-chat", "internlm2_chat", False),
        ("internlm/internlm2_5-7b-chat", "qwen_chat", True),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen_chat", False),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama2_chat", True),
        ("google/gemma-2-2b-it/", "gemma", False),
        ("someone/other", "qwen_chat", False),
    ],
)
def test_the_template_of_a_chat_model(model, template, wrong):
    text = f"""
model = dict(llm=dict(pretrained_model_name_or_path={model!r}))
train_dataset = dict(
    template_map_fn=dict(type=template_map_fn_factory, template=PROMPT_TEMPLATE.{template})
)
"""
    assert bool(keys(training.template_of_another_family, text)) is wrong


QUANTIZED = "dict(quantization_config=dict(type=BitsAndBytesConfig, load_in_4bit=True))"


def test_quantized_weights_need_an_adapter():
    rule = training.quantized_full_training
    text = f"model = dict(type=SupervisedFinetune, llm={QUANTIZED}"
    assert keys(rule, text + ")") == ["model.llm.quantization_config"]
    assert not keys(rule, text + ", lora=dict(r=8))")
    assert not keys(rule, text.replace("SupervisedFinetune", "DPO") + ")")


@pytest.mark.parametrize(
    ("lr", "lora", "path", "hint"),
    [
        ("2e-4", "None", "Qwen/Qwen2.5-7B", "lr = 2e-5"),
        ("2e-5", "None", "Qwen/Qwen2.5-7B", None),
        ("2e-4", "None", "./tiny", None),
        ("1e-6", "dict(r=8)", "Qwen/Qwen2.5-7B", "lr = 2e-4"),
        ("2e-4", "dict(r=8)", "Qwen/Qwen2.5-7B", None),
    ],
)
def test_learning_rates(lr, lora, path, hint):
    text = f"""
model = dict(
    type=SupervisedFinetune, lora={lora}, llm=dict(pretrained_model_name_or_path={path!r})
)
optim_wrapper = dict(optimizer=dict(type=AdamW, lr={lr}))
"""
    found = findings(training.learning_rate_of_lora, text)
    assert [finding.hint for finding in found] == ([hint] if hint else [])


def test_braces_in_a_system_text():
    text = "custom_hooks = [dict(type=EvaluateChatHook, system={!r})]"
    assert keys(training.braces_in_system, text.format("Today is {date}"))
    assert not keys(training.braces_in_system, text.format("plain"))


@pytest.mark.parametrize("vocabulary", [{"a": 0}, [["a", -1.0]]], ids=["dict", "unigram"])
def test_tokens_that_a_local_tokenizer_lacks(tmp_path, vocabulary):
    content = {"model": {"vocab": vocabulary}, "added_tokens": [{"content": "</s>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = f"tokenizer = dict(pretrained_model_name_or_path={str(tmp_path)!r}, {{}})"
    wrong = text.format("eos_token='<|im_end|>', pad_token='</s>'")
    assert keys(training.eos_not_in_tokenizer, wrong) == ["tokenizer.eos_token"]
    assert not keys(training.eos_not_in_tokenizer, text.format("eos_token='a'"))


def test_a_damaged_tokenizer_file_is_left_to_its_library(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    assert training.local_json(str(tmp_path), "tokenizer.json") == {}
    (tmp_path / "tokenizer.json").write_text("[]")
    assert training.local_json(str(tmp_path), "tokenizer.json") == {}


def test_padding_with_the_end_of_text():
    text = "tokenizer = dict(pad_token='</s>', eos_token={!r})"
    assert keys(training.pad_is_eos, text.format("</s>")) == ["tokenizer.pad_token"]
    assert not keys(training.pad_is_eos, text.format("<|end|>"))


def test_a_tokenizer_of_another_model():
    text = """
tokenizer = dict(pretrained_model_name_or_path='a/b')
model = dict(llm=dict(pretrained_model_name_or_path={!r}))
"""
    assert keys(training.tokenizer_of_another_model, text.format("c/d"))
    assert not keys(training.tokenizer_of_another_model, text.format("a/b"))


@pytest.mark.parametrize(("grouped", "wrong"), [(8, False), (4, True)])
def test_groups_of_rows(grouped, wrong):
    text = f"""
from xtuner.dataset.samplers import LengthGroupedSampler
optim_wrapper = dict(accumulative_counts=2)
train_dataloader = dict(
    batch_size=4, sampler=dict(type=LengthGroupedSampler, per_device_batch_size={grouped})
)
"""
    assert bool(keys(training.groups_of_another_batch_size, text)) is wrong


@pytest.mark.parametrize(
    ("scale", "wrong"), [("'dynamic'", False), ("512.0", False), ("'auto'", True)]
)
def test_loss_scale(scale, wrong):
    text = f"optim_wrapper = dict(loss_scale={scale}, dtype='float16')"
    assert bool(keys(training.unknown_loss_scale, text)) is wrong


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ("dataset_map_fn=alpaca_map_fn", True),
        ("dataset_map_fn=pretrain_map_fn", False),
        ("dataset_map_fn=alpaca_map_fn, do_dataset_tokenization=False", False),
        ("dataset_map_fn=alpaca_map_fn, template_map_fn=dict(type=template_map_fn_factory)", False),
        ("", False),
    ],
)
def test_turns_without_a_template(settings, wrong):
    assert bool(keys(training.template_missing, DATASET.format(settings))) is wrong
