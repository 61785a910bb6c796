"""Signals and time limits are noted and heeded when asked."""

import os
import signal
import time

import pytest

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
