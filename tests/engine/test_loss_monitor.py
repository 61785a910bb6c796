"""Judging losses: not finite, far above the usual, or all right."""

from __future__ import annotations

import math

import pytest

from xtuner.engine.runner.loss_monitor import LossMonitor
from xtuner.utils.errors import UserError


def watch_after(losses, **settings) -> LossMonitor:
    watch = LossMonitor(**settings)
    for loss in losses:
        assert watch.check(loss, 1.0, scaled=False) is None
    return watch


NOISY = [2.0 + 0.1 * (n % 5) for n in range(32)]


def test_a_spike_is_far_above_the_usual():
    watch = watch_after(NOISY, on_spike="skip")
    assert watch.check(4.0, 1.0, scaled=False) is None  # less than double the median
    what, action = watch.check(9.0, 1.0, scaled=False)
    assert "jumped to 9" in what
    assert action == "skip"


def test_a_run_that_learns_is_no_spike():
    watch_after([10 * math.exp(-n / 20) + 0.1 * (n % 3) for n in range(200)])


def test_a_noisy_run_has_no_spikes():
    losses = [(1.0, 3.0, 0.5, 2.5)[n % 4] for n in range(64)]
    watch = watch_after(losses)
    assert watch.check(5.0, 1.0, scaled=False) is None


def test_nothing_is_a_spike_before_enough_is_known():
    assert watch_after([1.0] * 10).check(100.0, 1.0, scaled=False) is None


def test_gradients_that_overflow_are_the_loss_scalers_business():
    assert LossMonitor().check(1.0, math.inf, scaled=True) is None
    what, action = LossMonitor(on_bad_loss="skip").check(1.0, math.inf, scaled=False)
    assert "gradient norm is inf" in what
    assert action == "skip"
    assert LossMonitor().check(math.nan, 1.0, scaled=True)[1] == "stop"


def test_an_unknown_policy_is_refused():
    with pytest.raises(UserError, match="on_bad_loss is 'ignore'"):
        LossMonitor(on_bad_loss="ignore")
