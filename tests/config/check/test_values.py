"""Rules about single values: each finds the wrong one and accepts the limits of the right ones."""

from __future__ import annotations

import os

import pytest

from tests.config.check.rules import findings, keys
from xtuner.config.check import values


@pytest.mark.parametrize("value", ["0", "-1", "'3'", "True", "[1]", "0.5", "2.0", "float('nan')"])
def test_not_positive(value):
    assert keys(values.not_positive, f"train_dataloader = dict(batch_size={value})") == [
        "train_dataloader.batch_size"
    ]


@pytest.mark.parametrize("value", ["1", "None"])
def test_positive(value):
    assert not keys(values.not_positive, f"train_dataloader = dict(batch_size={value})")
    assert not keys(values.not_positive, "optim_wrapper = dict(optimizer=dict(lr=0.5))")


@pytest.mark.parametrize(
    ("value", "hint"),
    [("1e-5,", "a comma"), ("'1e-5'", "without quotes"), ("float('inf')", None), ("'x'", None)],
)
def test_how_a_number_became_something_else(value, hint):
    text = f"lr = {value}\noptim_wrapper = dict(optimizer=dict(lr=lr))"
    (found,) = findings(values.not_positive, text)
    assert found.hint is None if hint is None else hint in found.hint


def test_every_positive_setting_is_looked_at():
    text = """
optim_wrapper = dict(optimizer=dict(lr=0), accumulative_counts=-2, clip_grad=dict(max_norm=0))
train_cfg = dict(max_epochs=0, max_iters=-1)
model = dict(lora=dict(r=0, lora_alpha=-1))
max_length = 0
"""
    assert set(keys(values.not_positive, text)) == {
        "optim_wrapper.optimizer.lr",
        "optim_wrapper.accumulative_counts",
        "optim_wrapper.clip_grad.max_norm",
        "train_cfg.max_epochs",
        "train_cfg.max_iters",
        "model.lora.r",
        "model.lora.lora_alpha",
        "max_length",
    }


@pytest.mark.parametrize(
    ("value", "wrong"), [("1", True), ("-0.1", True), ("0", False), ("0.99", False)]
)
def test_shares(value, wrong):
    text = f"model = dict(lora=dict(lora_dropout={value}))"
    assert bool(keys(values.not_a_share, text)) is wrong


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ("(0.9, 0.999)", False),
        ("[0, 0.5]", False),
        ("0.9", True),
        ("(0.9,)", True),
        ("(0.9, 1.0)", True),
    ],
)
def test_betas(value, wrong):
    text = f"optim_wrapper = dict(optimizer=dict(betas={value}))"
    assert bool(keys(values.wrong_betas, text)) is wrong


def test_a_misspelt_dtype_lists_the_right_ones():
    text = "optim_wrapper = dict(dtype='bfloat61')\nmodel = dict(llm=dict(dtype=torch.bfloat16))"
    (found,) = findings(values.unknown_dtype, text)
    assert found.key == "optim_wrapper.dtype"
    assert "bfloat16" in found.hint
    assert not keys(values.unknown_dtype, "model = dict(llm=dict(dtype='auto'))")


@pytest.mark.parametrize(("value", "wrong"), [("0", False), ("0.1", False), ("-0.1", True)])
def test_weight_decay(value, wrong):
    text = f"optim_wrapper = dict(optimizer=dict(weight_decay={value}))"
    assert bool(keys(values.negative_weight_decay, text)) is wrong


def test_a_work_dir_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    assert keys(values.work_dir_not_writable, f"work_dir = {str(tmp_path / 'file' / 'x')!r}")
    assert not keys(values.work_dir_not_writable, f"work_dir = {str(tmp_path / 'a' / 'b')!r}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_work_dir_that_is_read_only(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert keys(values.work_dir_not_writable, f"work_dir = {str(tmp_path / 'locked' / 'x')!r}")


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("./a", True),
        ("/a", True),
        ("~/a", True),
        ("../a", True),
        ("a/b", False),
        (3, False),
        (None, False),
    ],
)
def test_local_paths(path, local):
    assert values.looks_local(path) is local


def test_a_model_folder_that_before_run_makes_may_be_absent(tmp_path):
    folder = str(tmp_path / "base")
    model = f"model = dict(llm=dict(pretrained_model_name_or_path={folder!r}))\n"
    assert keys(values.no_such_model_folder, model) == ["model.llm.pretrained_model_name_or_path"]
    made = f"before_run = [dict(type=load_dataset, save_dir={folder!r})]\n"
    assert not keys(values.no_such_model_folder, model + made)
    (tmp_path / "base").mkdir()
    assert not keys(values.no_such_model_folder, model)


def test_checkpoints(tmp_path):
    absent = str(tmp_path / "iter_1.pth")
    assert keys(values.no_such_checkpoint, f"load_from = {absent!r}") == ["load_from"]
    assert keys(values.no_such_pretrained_part, f"model = dict(pretrained_pth={absent!r})")
    (tmp_path / "iter_1.pth").write_text("")
    assert not keys(values.no_such_checkpoint, f"load_from = {absent!r}")


@pytest.mark.parametrize(
    ("value", "wrong"), [("0", True), ("'no'", True), ("-1", False), ("500", False)]
)
def test_checkpoint_interval(value, wrong):
    text = f"default_hooks = dict(checkpoint=dict(interval={value}))"
    assert bool(keys(values.saves_every_zero_batches, text)) is wrong


@pytest.mark.parametrize(
    ("lengths", "both", "none"),
    [
        ("max_epochs=1, max_iters=2", True, False),
        ("max_epochs=1", False, False),
        ("max_iters=1, max_epochs=None", False, False),
        ("val_interval=1", False, True),
    ],
)
def test_length_of_training(lengths, both, none):
    text = f"train_cfg = dict(type=TrainLoop, {lengths})"
    assert bool(keys(values.both_lengths_of_training, text)) is both
    assert bool(keys(values.no_length_of_training, text)) is none


def test_two_quantizations():
    text = "model = dict(llm=dict(quantization_config=dict(type=BitsAndBytesConfig, {})))"
    both = text.format("load_in_4bit=True, load_in_8bit=True")
    assert keys(values.two_quantizations, both) == ["model.llm.quantization_config.load_in_8bit"]
    assert not keys(values.two_quantizations, text.format("load_in_4bit=True, load_in_8bit=False"))


@pytest.mark.parametrize(
    ("value", "wrong"), [("0.5", False), ("10", False), ("-1", True), ("'5'", True)]
)
def test_evaluation_interval(value, wrong):
    text = f"custom_hooks = [dict(type=EvaluateChatHook, every_n_iters={value})]"
    assert bool(keys(values.bad_evaluation_interval, text)) is wrong


def test_evaluation_inputs():
    text = "custom_hooks = [dict(type=EvaluateChatHook, evaluation_inputs={})]"
    assert keys(values.evaluation_inputs_not_a_list, text.format("'one question'"))
    assert not keys(values.evaluation_inputs_not_a_list, text.format("['one question']"))


def test_a_switch_in_quotes():
    text = "model = dict(type=SupervisedFinetune, use_varlen_attn='False', name='falsehood')"
    assert keys(values.text_for_a_switch, text) == ["model.use_varlen_attn"]


@pytest.mark.parametrize(
    ("value", "wrong"), [("2048", False), ("'2048'", True), ("1.5", True), ("0", True)]
)
def test_max_length_of_a_dataset(value, wrong):
    text = f"train_dataset = dict(type=process_hf_dataset, max_length={value})"
    assert bool(keys(values.text_for_a_number, text)) is wrong


def test_losses_belong_to_their_model():
    assert not keys(values.unknown_loss_type, "model = dict(type=DPO, loss_type='ipo')")
    (found,) = findings(values.unknown_loss_type, "model = dict(type=DPO, loss_type='focal')")
    assert "sigmoid" in found.hint
    assert not keys(values.unknown_loss_type, "model = dict(type=RewardModel, loss_type='focal')")
    assert not keys(values.unknown_loss_type, "model = dict(type=AdamW, loss_type='own')")


@pytest.mark.parametrize(
    ("value", "wrong"), [("True", False), ("'auto'", False), ("'yes'", True), ("1", True)]
)
def test_compile(value, wrong):
    assert bool(keys(values.unknown_compile, f"model = dict(compile={value})")) is wrong
