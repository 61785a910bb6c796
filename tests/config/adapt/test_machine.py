"""Adapting a config to a machine: what changes is said, the rest stays."""

from __future__ import annotations

import pytest
import torch

from tests.engine.toy import write_config
from xtuner.config import dump_config, load_config
from xtuner.config.adapt import machine
from xtuner.config.adapt.machine import adapt_to_machine, supported_dtype
from xtuner.config.compat import adapt_published
from xtuner.engine.hooks import CheckpointHook
from xtuner.engine.optim import FinetuneOptimWrapper
from xtuner.engine.runner import TrainLoop, ValLoop

MODEL = """
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
import torch
model = dict(
    type=ToyModel,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        torch_dtype=torch.float16,
        attn_implementation="flash_attention_2",
        quantization_config=dict(
            type=BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16
        ),
    ),
)
val_dataloader = dict(batch_size=1)
"""


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_cpu_has_bf16", lambda: True)


def test_on_a_cpu(tmp_path, on_a_cpu):
    cfg = load_config(str(write_config(tmp_path, MODEL)))
    adapt_published(cfg)
    said = adapt_to_machine(cfg, launcher="pytorch")
    assert cfg.optim_wrapper.type is FinetuneOptimWrapper
    assert cfg.optim_wrapper.dtype == "bfloat16"
    assert cfg.optim_wrapper.device == "cpu"
    assert cfg.optim_wrapper.optimizer.fused is True
    assert cfg.model.llm.dtype is torch.bfloat16
    assert "torch_dtype" not in cfg.model.llm
    assert "attn_implementation" not in cfg.model.llm
    assert cfg.model.llm.quantization_config.bnb_4bit_compute_dtype is torch.bfloat16
    assert cfg.env_cfg.dist_cfg.backend == "gloo"
    assert cfg.default_hooks.checkpoint.type is CheckpointHook
    assert cfg.train_cfg.type is TrainLoop
    assert cfg.val_cfg.type is ValLoop
    for words in ("optim_wrapper.dtype=float16", "model.llm.dtype=float16", "flash", "gloo"):
        assert any(words in line for line in said), words


def test_the_adapted_config_loads_again_and_needs_nothing_more(tmp_path, on_a_cpu):
    cfg = load_config(str(write_config(tmp_path, MODEL)))
    adapt_published(cfg)
    adapt_to_machine(cfg)
    again_path = tmp_path / "again.py"
    again_path.write_text(dump_config(cfg))
    again = load_config(str(again_path))
    assert adapt_to_machine(again) == []
    assert again.optim_wrapper.dtype == "bfloat16"
    assert again.model.llm.dtype is torch.bfloat16


def test_on_a_gpu_fp16_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # as on a T4, where torch emulates bfloat16
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert supported_dtype("float16") == "float16"
    assert supported_dtype("bfloat16") == "float16"
    assert supported_dtype("float32") == "float32"
    cfg = load_config(str(write_config(tmp_path)))
    assert adapt_to_machine(cfg) == []
    assert cfg.optim_wrapper.dtype == "float16"
    assert cfg.optim_wrapper.device == "cuda"
    assert cfg.env_cfg.dist_cfg.backend == "nccl"


def test_a_cpu_without_bf16_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_cpu_has_bf16", lambda: False)
    assert supported_dtype("float16") == supported_dtype("bfloat16") == "float32"


EPOCHS = "val_dataloader = dict(batch_size=1)\ntrain_cfg = {}\n"


@pytest.mark.parametrize(
    ("train_cfg", "interval", "by_epoch"),
    [
        ("dict(by_epoch=True, max_epochs=3, val_interval=2)", 2, True),
        ("dict(by_epoch=True, max_epochs=3)", 1, True),
        ("dict(type=EpochBasedTrainLoop, max_epochs=3, val_interval=2)", 2, True),
        ("dict(type='EpochBasedTrainLoop', max_epochs=3)", 1, True),
        ("dict(by_epoch=False, max_iters=3, val_interval=2)", 2, None),
        ("dict(type=IterBasedTrainLoop, max_iters=3, val_interval=2)", 2, None),
        ("dict(type=TrainLoop, max_epochs=3, val_interval=2)", 2, None),
        ("dict(type=TrainLoop, max_epochs=3)", None, None),
    ],
)
def test_loops_of_mmengine_keep_their_meaning(tmp_path, train_cfg, interval, by_epoch):
    """Epoch-based loops count validations in epochs, the others in micro-batches."""
    imports = "from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop\n"
    cfg = load_config(str(write_config(tmp_path, imports + EPOCHS.format(train_cfg))))
    adapt_to_machine(cfg)
    assert cfg.train_cfg.type is TrainLoop
    assert cfg.train_cfg.get("val_interval") == interval
    assert cfg.train_cfg.get("val_by_epoch") is by_epoch
    assert "by_epoch" not in cfg.train_cfg


def test_every_class_of_the_engine_exists():
    """They are named by text, so that config does not import the engine."""
    from mmengine.config.lazy import LazyObject

    from xtuner.config.adapt import engine_types

    named = [value for value in vars(engine_types).values() if isinstance(value, LazyObject)]
    named += engine_types.LOOPS.values()
    assert len(named) > 8
    for name in named:
        assert name.build().__name__ == str(name)


def test_a_custom_loop_and_a_custom_hook_stay(tmp_path):
    text = """
from tests.engine.toy import ToyRows
train_cfg = dict(type=ToyRows, max_epochs=1)
default_hooks.update(checkpoint=dict(type=ToyRows))
"""
    cfg = load_config(str(write_config(tmp_path, text)))
    adapt_to_machine(cfg)
    assert cfg.train_cfg.type.__name__ == cfg.default_hooks.checkpoint.type.__name__ == "ToyRows"
