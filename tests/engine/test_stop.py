"""Signals and time limits are noted and heeded when asked."""

import os
import signal
import time

import pytest
import torch

from xtuner.engine.stop import OUT_OF_TIME, SAVE, STOPPING, Stop, exit_status, told


@pytest.fixture
def not_ignored():
    """A shell's background job has SIGINT ignored, and with it the tests that run there."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_the_first_signal_is_noted_and_a_second_one_ends_at_once(
    number, status, capfd, not_ignored
):
    stop = Stop()
    stop.install()
    assert stop.agreed() is None
    os.kill(os.getpid(), number)
    assert stop.agreed() == number and exit_status(number) == status
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGUSR1)  # Slurm may send both: this one still ends nothing
    stop.uninstall()
    assert signal.getsignal(number) == signal.SIG_DFL
    assert number.name in told(number)
    assert f"{number.name} was received: after this optimizer step" in capfd.readouterr().err


def test_a_signal_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = Stop()
    try:
        stop.install()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.agreed() is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        stop.uninstall()
        signal.signal(signal.SIGHUP, before)


def test_usr1_saves_once_and_goes_on(capfd):
    stop = Stop()
    stop.install()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert [stop.agreed(), stop.agreed()] == [SAVE, None]
    assert "SIGUSR1 was received" in capfd.readouterr().err
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)  # matters more
    assert stop.agreed() == signal.SIGTERM


def test_all_ranks_save_when_one_is_told_to(monkeypatch):
    stop = Stop()
    monkeypatch.setattr("xtuner.engine.stop.get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    wish_of_another = [SAVE, signal.SIGTERM]
    monkeypatch.setattr(
        torch.distributed,
        "all_reduce",
        lambda told, op: told.fill_(max(int(told), wish_of_another.pop(0))),
    )
    assert [stop.agreed(), stop.agreed()] == [SAVE, signal.SIGTERM]


def test_the_end_of_a_slurm_job_is_heeded_only_where_asked(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 2000))
    assert Stop(save_before=None).agreed() is None
    assert Stop(save_before=600).agreed() is None
    assert Stop(save_before=4000).agreed() == OUT_OF_TIME


def test_a_signal_during_the_agreement_is_heeded_at_the_next_step(monkeypatch):
    stop = Stop()
    stop.install()
    monkeypatch.setattr("xtuner.engine.stop.get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    arrives = [True, False]

    def all_reduce(told, op):
        if arrives.pop(0):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert stop.agreed() is None  # the other ranks were told nothing yet
    assert stop.agreed() == signal.SIGTERM
    stop.uninstall()
