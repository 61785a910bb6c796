"""A process group is joined from a launcher's environment, and destroyed with what hangs on it."""

import os

import pytest
import torch.distributed as dist

from xtuner.parallel import processes
from xtuner.parallel.sequence import groups
from xtuner.utils.errors import UserError


@pytest.fixture
def alone():
    processes.init_single_process()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_launcher_that_did_not_start_us_is_refused(monkeypatch):
    for name in processes.LAUNCHER_ENV["slurm"]:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="--launcher slurm expects SLURM_PROCID, SLURM_NTASKS"):
        processes.init_distributed("slurm", "gloo")
    assert not dist.is_initialized()


def test_shutdown_calls_each_callback_once_while_the_group_exists(alone, monkeypatch):
    monkeypatch.setattr(processes, "_on_shutdown", [])
    seen = []

    def callback():
        seen.append(dist.is_initialized())

    processes.on_shutdown(callback)
    processes.on_shutdown(callback)
    processes.shutdown_distributed()
    assert seen == [True]
    assert not dist.is_initialized()
    processes.shutdown_distributed()  # nothing is left to do
    assert seen == [True]


def test_a_single_process_leaves_no_variables_of_a_launcher_behind(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    processes.init_single_process()
    assert os.environ["LOCAL_RANK"] == "0"
    processes.shutdown_distributed()
    assert "LOCAL_RANK" not in os.environ


def test_shutdown_drops_the_sequence_parallel_groups(alone, monkeypatch):
    groups.init_sequence_parallel(1)
    monkeypatch.setattr(groups, "_layout", groups._Layout(size=2, group=dist.group.WORLD))
    processes.shutdown_distributed()
    assert groups.get_sequence_parallel_group() is None
    assert groups.get_sequence_parallel_world_size() == 1
