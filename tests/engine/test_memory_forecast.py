"""The warning before weights are read, with a GPU's answers in place of a GPU."""

from types import SimpleNamespace

import pytest
import torch

from tests.engine import toy
from tests.helpers.architectures import make_config
from xtuner.config.load import load
from xtuner.config.override import override
from xtuner.engine.memory_forecast import memory_warning
from xtuner.engine.runner.training_runner import TrainingRunner
from xtuner.engine.train import build_training_runner
from xtuner.model.loading import is_zero3_init_enabled

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


@pytest.mark.parametrize("model", [None, {"type": toy.ToyModel}, {"type": "not registered"}])
def test_a_model_that_no_plan_is_made_of(config, monkeypatch, model):
    """It may train all the same: nothing is said, and nothing ends the run."""
    gpu_with(monkeypatch, 0)
    unknown = config.copy()
    unknown.model = model
    assert memory_warning(unknown) is None


def test_it_comes_before_there_is_a_process_group(config, monkeypatch, capsys):
    """DeepSpeed would shard the model without weights, too: one process would wait for all."""
    gpu_with(monkeypatch, GIB // 512)

    class Arrived(Exception):
        pass

    def arrived(cfg):
        assert not torch.distributed.is_initialized() and not is_zero3_init_enabled()
        raise Arrived

    monkeypatch.setattr(TrainingRunner, "from_cfg", arrived)
    with pytest.raises(Arrived):
        build_training_runner(config)
    assert "warning: this run needs about" in capsys.readouterr().out
