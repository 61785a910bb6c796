"""A config whose rows processes share: what is changed, what is refused, what is counted."""

import functools
import io
from contextlib import redirect_stderr
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler

from tests.helpers.tiny import make_model
from xtuner.checkpoint.fingerprint import changes, fingerprints
from xtuner.config.adapt.machine import adapt_to_machine
from xtuner.engine.hooks.throughput_hook import ThroughputHook
from xtuner.engine.runner import finetune_runner, loops
from xtuner.entry_point import main
from xtuner.model import SupervisedFinetune
from xtuner.parallel.sequence import SequenceParallelSampler, groups
from xtuner.utils.errors import UserError


@pytest.fixture
def two_to_a_row(monkeypatch):
    """The second process of four, as far as who shares a row goes."""
    monkeypatch.setattr(groups, "_layout", groups._Layout(size=2))
    monkeypatch.setattr(groups, "get_dist_info", lambda: (1, 4))


def config(**settings):
    loader = dict(sampler=dict(type=DefaultSampler, shuffle=True))
    return Config(dict(train_dataloader=loader, **settings))


def test_the_plain_sampler_is_replaced_and_that_is_said():
    cfg = config(sequence_parallel_size=2)
    assert any("SequenceParallelSampler is used" in line for line in adapt_to_machine(cfg))
    assert cfg.train_dataloader.sampler.type is SequenceParallelSampler
    alone = config()
    adapt_to_machine(alone)
    assert alone.train_dataloader.sampler.type is DefaultSampler


def test_the_size_beside_deepspeeds_settings_counts():
    cfg = config(strategy=dict(type="DeepSpeedStrategy", sequence_parallel_size=4))
    adapt_to_machine(cfg)
    assert cfg.sequence_parallel_size == 4


def test_transformers_trainer_cannot():
    with pytest.raises(UserError, match="Trainer cannot share rows"):
        adapt_to_machine(config(sequence_parallel_size=2, framework="huggingface"))


@pytest.mark.parametrize(
    ("language", "text"),
    [("en", "does not divide the number of processes, 1"), ("zh", "不能整除进程数 1")],
)
def test_too_few_processes_are_told(tmp_path, monkeypatch, language, text):
    monkeypatch.setenv("XTUNER_LANG", language)
    printed = io.StringIO()
    words = ["train", "quickstart", "--work-dir", str(tmp_path / "run")]
    monkeypatch.chdir(tmp_path)
    with redirect_stderr(printed):
        assert main([*words, "--cfg-options", "sequence_parallel_size=3"]) == 1
    assert text in printed.getvalue()
    assert "NPROC_PER_NODE=3" in printed.getvalue()


def test_a_model_that_computes_whole_rows_is_refused(two_to_a_row):
    runner = SimpleNamespace(cfg=Config(dict()))
    with pytest.raises(UserError, match="Linear cannot leave a part of each row"):
        finetune_runner.FinetuneRunner.wrap_model(runner, None, torch.nn.Linear(1, 1))


def test_our_models_share_rows(two_to_a_row):
    class Wraps:
        def wrap(self, model, device, settings):
            return model

    runner = SimpleNamespace(cfg=Config(dict()), strategy=Wraps(), device=torch.device("cpu"))
    model = SupervisedFinetune(make_model("llama"))
    assert finetune_runner.FinetuneRunner.wrap_model(runner, None, model) is model


def test_workers_of_a_group_draw_the_same_numbers(two_to_a_row):
    loader = SimpleNamespace(worker_init_fn=functools.partial(dict, rank=1, seed=3))
    loops._share_worker_seeds(loader)
    assert loader.worker_init_fn() == {"rank": 0, "seed": 3}


def test_throughput_is_that_of_a_stretch(two_to_a_row):
    hook = ThroughputHook(peak_tflops=1.0)
    runner = SimpleNamespace(train_loop=SimpleNamespace(step_finished=False))
    data = {"data": {"input_ids": torch.zeros(1, 10, dtype=torch.long)}}
    hook.after_train_iter(runner, 0, data, {})
    assert hook._tokens == 5
    assert hook._squares == 50


def test_resuming_with_other_groups_is_noticed():
    before = fingerprints(config={}, world_size=4, data_parallel_size=2)
    now = fingerprints(config={}, world_size=4)
    (change,) = changes(before, now)
    assert change.kind == "world_size"
    assert change.text.endswith("2 -> 4")
    before.pop("data_parallel_size")  # written by an earlier version
    assert not changes(before, now)
