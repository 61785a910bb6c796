"""The plan of a run names the size of its checkpoints and the room on their disk."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from mmengine.hooks import CheckpointHook

from tests.engine.toy import make_runner
from xtuner.reporting.checkpoint_disk import checkpoint_disk
from xtuner.reporting.summary import count_parameters, run_summary


@pytest.mark.parametrize(
    ("settings", "optimizer", "count", "bytes_each"),
    [
        (dict(interval=2, by_epoch=False, max_keep_ckpts=2), torch.optim.AdamW, 3, 12),
        (dict(interval=4, by_epoch=False, max_keep_ckpts=2), torch.optim.AdamW, 2, 12),
        (dict(interval=2, by_epoch=False), torch.optim.AdamW, 4, 12),
        (dict(interval=1, save_optimizer=False), torch.optim.AdamW, 1, 4),
        (dict(interval=2, by_epoch=False), torch.optim.SGD, 4, 8),
        (dict(interval=-1, save_last=False), torch.optim.SGD, None, None),
    ],
)
def test_size_and_count(settings, optimizer, count, bytes_each, tmp_path, monkeypatch):
    hooks = [dict(type=CheckpointHook, **settings)]
    runner = make_runner(tmp_path, optimizer=optimizer, rows=8, hooks=hooks)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    trained, _ = count_parameters(runner.model)
    disk = checkpoint_disk(runner, trained)
    if count is None:
        assert disk is None
        return
    assert (disk.count, disk.size) == (count, trained * bytes_each)
    assert f"{count} at once" in dict(run_summary(runner))["checkpoints"]
    assert "warning" not in [label for label, text in run_summary(runner) if "disk" in text]
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, disk.size * count - 1))
    assert not checkpoint_disk(runner, trained).is_enough
    assert [label for label, text in run_summary(runner) if "max_keep_ckpts" in text] == ["warning"]
