"""Configs that transformers' Trainer trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset

from xtuner.entry_point import main

CONFIG = """
from peft import LoraConfig
from tests.engine.test_huggingface import collate, rows
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

framework = "huggingface"
pretrained_model_name_or_path = {base!r}
tokenizer = dict(
    type=AutoTokenizer.from_pretrained,
    pretrained_model_name_or_path=pretrained_model_name_or_path,
)
model = dict(
    type=AutoModelForCausalLM.from_pretrained,
    pretrained_model_name_or_path=pretrained_model_name_or_path,
)
train_dataset = dict(type=rows)
trainer = dict(type=Trainer, data_collator=dict(type=collate))
training_args = dict(
    type=TrainingArguments,
    learning_rate=1e-2,
    lr_scheduler_type="cosine",
    warmup_steps=1,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    num_train_epochs=1,
    fp16=True,
    logging_steps=1,
    optim="adamw_torch",
    save_strategy="steps",
    save_steps=1,
    save_total_limit=1,
    ddp_find_unused_parameters=False,
)
"""
LORA = 'lora = dict(type=LoraConfig, r=4, task_type="CAUSAL_LM")\n'


def rows() -> Dataset:
    return Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 8, "labels": [[5, 6, 7, 8]] * 8})


def collate(samples: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([s[name] for s in samples]) for name in ("input_ids", "labels")}


@pytest.mark.parametrize("extra", ["", LORA], ids=["full", "lora"])
def test_a_trainer_config_trains(tmp_path: Path, tiny_llama: Path, capsys, extra: str):
    from transformers import AutoModelForCausalLM

    config, out = tmp_path / "trainer.py", tmp_path / "out"
    config.write_text(CONFIG.format(base=str(tiny_llama)) + extra)
    assert main(["train", str(config), "--work-dir", str(out)]) == 0
    said = capsys.readouterr().out
    assert "training_args.fp16 does not run on this machine" in said or torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before, after = (m(input_ids=ids, labels=ids).loss for m in (base, model))
    assert after < before
    assert (out / "adapter_config.json").exists() == bool(extra)
    assert main(["train", str(config), "--work-dir", str(out), "--resume"]) == 0
    (checkpoint,) = out.glob("checkpoint-*")
    words = ["train", str(config), "--work-dir", str(tmp_path / "other"), "--resume"]
    assert main([*words, str(checkpoint)]) == 0
    assert main([*words, str(out / "checkpoint-77")]) == 1
    assert "no such checkpoint" in capsys.readouterr().err


def test_an_argument_that_is_gone_is_named(tmp_path, tiny_llama, capsys):
    config = tmp_path / "trainer.py"
    config.write_text(
        CONFIG.format(base=str(tiny_llama)) + "training_args.update(overwrite_output_dir=True)\n"
    )
    assert main(["train", str(config), "--work-dir", str(tmp_path / "out")]) == 1
    assert "overwrite_output_dir" in capsys.readouterr().err
