"""What the corpus of tests/errors cannot show: the environment, local models, stopping a run."""

import json

import pytest

from xtuner.config import load_config
from xtuner.config.check import check, check_or_raise
from xtuner.config.load import load
from xtuner.config.override import override
from xtuner.utils.errors import UserError

NAME = "internlm2_chat_7b_qlora_alpaca_e3"


def codes(problems):
    return [problem.code for problem in problems]


def test_world_size(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert "XT0305" in codes(check(NAME, ["sequence_parallel_size=4"]))
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "XT0305" not in codes(check(NAME, ["sequence_parallel_size=4"]))


def test_eos_of_a_local_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "</s>"}]})
    )
    options = [f"pretrained_model_name_or_path={tmp_path}"]
    assert "XT0333" not in codes(check(NAME, [*options, "tokenizer.eos_token=</s>"]))
    found = [
        p for p in check(NAME, [*options, "tokenizer.eos_token=<|im_end|>"]) if p.code == "XT0333"
    ]
    assert len(found) == 1 and "'<|im_end|>'" in found[0].message


def test_pretrained_part(tmp_path):
    name = "llava_internlm2_chat_7b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune"
    assert "XT0328" in codes(check(name, ["model.pretrained_pth=./no/such.pth"]))


def test_group_size():
    name = "llava_internlm2_chat_7b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune"
    key = "train_dataloader.sampler.per_device_batch_size"
    assert "XT0336" in codes(check(name, [f"{key}=3"]))
    assert "XT0336" not in codes(check(name))


def test_all_at_once():
    options = ["accumulative_counts=0", "batch_size=4", "warmup_ratio=9", "lora_typo=1"]
    found = codes(check(NAME, options[:3]))
    assert {"XT0310", "XT0302", "XT0308"} <= set(found)
    assert codes(check(NAME, options)) == ["XT0002"]


def test_loaded_config_is_checked_too():
    cfg = load_config(NAME)
    cfg.train_dataloader.batch_size = 4
    assert "XT0302" in codes(check(cfg))


def test_errors_stop_a_run():
    with pytest.raises(UserError) as error:
        check_or_raise(override(load(NAME), ["batch_size=4", "accumulative_counts=0"]))
    assert "XT0310" in str(error.value)
    assert f"{NAME}.py:" in str(error.value)


def test_warnings_do_not(capsys):
    check_or_raise(override(load(NAME), ["lr=1e-6"]))
    assert "XT0331" in capsys.readouterr().err


def test_chinese(monkeypatch):
    monkeypatch.setenv("XTUNER_LANG", "zh")
    problem = next(p for p in check(NAME, ["batch_size=4"]) if p.code == "XT0302")
    assert "警告 XT0302" in str(problem)
