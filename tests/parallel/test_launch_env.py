"""What a launcher's environment says, before there is a process group."""

import datetime

import pytest

from xtuner.parallel.launch_env import LAUNCHER_ENV, collective_timeout, env_rank


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for names in LAUNCHER_ENV.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_no_rank():
    assert env_rank() is None


@pytest.mark.parametrize("launcher", LAUNCHER_ENV)
def test_each_launcher_gives_a_rank(launcher, monkeypatch):
    monkeypatch.setenv(LAUNCHER_ENV[launcher][0], "3")
    assert env_rank() == 3


def test_torchrun_under_slurm_counts_by_torchruns_rank(monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert env_rank() == 5


@pytest.mark.parametrize(("minutes", "expected"), [(None, 60), ("90", 90), ("1", 30)])
def test_collectives_wait_for_the_preparation_of_data(minutes, expected, monkeypatch):
    monkeypatch.delenv("XTUNER_DATASET_TIMEOUT", raising=False)
    if minutes:
        monkeypatch.setenv("XTUNER_DATASET_TIMEOUT", minutes)
    assert collective_timeout() == datetime.timedelta(minutes=expected)
