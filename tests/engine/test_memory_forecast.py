"""The warning before weights are read, with a GPU's answers in place of a GPU."""

from types import SimpleNamespace

import pytest
import torch

from tests.helpers.architectures import make_config
from xtuner.config.load import load
from xtuner.config.override import override
from xtuner.engine.memory_forecast import memory_warning

GIB = 2**30


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = make_config("qwen3")
    model.architectures = ["Qwen3ForCausalLM"]
    model.save_pretrained(folder)
    options = [f"pretrained_model_name_or_path={folder}"]
    return override(load("qwen3_8b_lora_custom_sft_e1"), options).config


def gpu_with(monkeypatch, free):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 24 * GIB))
    properties = SimpleNamespace(total_memory=24 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)


def test_room_enough(config, monkeypatch):
    gpu_with(monkeypatch, 20 * GIB)
    assert memory_warning(config) is None


def test_another_process_has_the_memory(config, monkeypatch):
    gpu_with(monkeypatch, GIB // 512)
    said = memory_warning(config)
    assert "0.0 GiB are free" in said and "xtuner plan " in said and "--gpu 24GB" in said


def test_no_gpu(config):
    assert torch.cuda.is_available() or memory_warning(config) is None


def test_a_model_of_unknown_size(config, monkeypatch):
    gpu_with(monkeypatch, 0)
    unknown = config.copy()
    unknown.model = None
    assert memory_warning(unknown) is None
