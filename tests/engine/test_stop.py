"""Signals and time limits are noted and heeded when asked."""

import os
import signal
import time

import pytest
import torch

from xtuner.engine.stop import OUT_OF_TIME, Stop, exit_status, told


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_is_noted_and_the_handlers_are_given_back(number, status):
    before = signal.getsignal(number)
    stop = Stop()
    stop.install()
    assert stop.agreed() is None
    os.kill(os.getpid(), number)
    assert stop.agreed() == number and exit_status(number) == status
    assert signal.getsignal(number) == before
    assert number.name in told(number)


def test_the_end_of_a_slurm_job_is_heeded_only_where_asked(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    assert Stop(save_before=None).agreed() is None
    assert Stop(save_before=60).agreed() is None
    assert Stop(save_before=200).agreed() == OUT_OF_TIME


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
