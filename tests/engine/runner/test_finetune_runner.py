"""The runner: hooks that fail, and the command that starts it."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from mmengine.hooks import Hook

from tests.engine.toy import make_runner, metrics, write_config
from xtuner.engine.runner import finetune_runner
from xtuner.engine.runner.finetune_runner import FinetuneRunner
from xtuner.entry_point import main
from xtuner.utils.errors import UserError


class Fails(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        raise RuntimeError("out of ink")


class FailsToSave(Fails):
    essential = True


def test_a_failing_hook_says_so_and_training_goes_on(tmp_path, capsys):
    runner = make_runner(tmp_path, hooks=[Fails()])
    runner.train()
    assert runner.iter == 8
    assert "Fails.before_train_iter failed (RuntimeError: out of ink)" in capsys.readouterr().out


class FailsHereOnly(Hook):
    """As a hook that exchanges something with other ranks would fail on one of them."""

    def after_train_iter(self, runner, **kwargs):
        raise ValueError("here only")


class FailsAlone(FailsHereOnly):
    local = True


def test_with_several_processes_a_failing_hook_ends_the_training(tmp_path, monkeypatch, capsys):
    """The others may be waiting for this one within the hook; a local hook keeps none waiting."""
    monkeypatch.setattr("xtuner.engine.runner.finetune_runner.get_world_size", lambda: 2)
    runner = make_runner(tmp_path / "one", hooks=[FailsHereOnly()])
    with pytest.raises(UserError, match=r"FailsHereOnly.after_train_iter failed on rank 0 .*here"):
        runner.train()
    runner = make_runner(tmp_path / "other", hooks=[FailsAlone()])
    runner.train()
    assert runner.iter == 8


class Joined(Exception):
    """In place of a process group."""


@pytest.mark.parametrize("gpu", [False, True])
def test_processes_of_a_config_without_a_backend_meet_by_what_the_machine_has(monkeypatch, gpu):
    """mmengine asks for NCCL where a config has no ``env_cfg``; torch for a CPU has none."""

    def joined(launcher, backend):
        raise Joined(backend)

    monkeypatch.setattr(finetune_runner, "init_distributed", joined)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(finetune_runner, "use_expandable_segments", lambda: None)
    runner = SimpleNamespace(_launcher="pytorch")
    with pytest.raises(Joined, match="nccl" if gpu else "gloo"):
        FinetuneRunner.setup_env(runner, {"dist_cfg": {"backend": "nccl"}})


def test_a_failing_hook_that_matters_ends_the_training(tmp_path):
    with pytest.raises(RuntimeError, match="out of ink"):
        make_runner(tmp_path, hooks=[FailsToSave()]).train()


def test_the_command_trains_a_published_style_config(tmp_path, capsys):
    config = write_config(tmp_path)
    out = tmp_path / "out"
    status = main(["train", str(config), "--work-dir", str(out), "--cfg-options", "max_epochs=2"])
    shown = capsys.readouterr().out
    assert status == 0
    assert "optim_wrapper.dtype=float16 does not run on this machine" in shown
    assert "8 optimizer steps, 16 micro-batches, 2 epochs" in shown
    assert re.search(r"step 8/8 loss \d", shown)
    assert f"xtuner convert pth_to_hf {out}/toy_config.py {out}/iter_16.pth {out}/hf" in shown
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "iter_16.pth").exists()
    assert "max_epochs = 2" in (out / "toy_config.py").read_text()
    assert main(["train", str(out / "toy_config.py"), "--work-dir", str(tmp_path / "again")]) == 0

    def losses(folder):
        return [line["loss"] for line in metrics(folder)]

    assert losses(tmp_path / "again") == losses(out)
