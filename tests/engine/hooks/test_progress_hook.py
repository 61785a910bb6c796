"""Plain lines of progress: how often, and what they say."""

import itertools
import re

import pytest

from tests.engine.toy import make_runner
from xtuner.engine.hooks import progress_hook
from xtuner.engine.hooks.progress_hook import ProgressHook


def alone(runner):
    """The runner without the ProgressHook that each has."""
    runner._hooks.remove(next(h for h in runner.hooks if isinstance(h, ProgressHook)))
    return runner


def lines(printed):
    return [line for line in printed.splitlines() if line.startswith("step ")]


def test_a_line_every_interval_and_at_the_end(tmp_path, capsys):
    alone(make_runner(tmp_path, hooks=[ProgressHook(interval=3)])).train()
    steps = [
        re.match(r"step (\d+)/8 loss \d+\.\d{4}  lr 1.00e-01", line)
        for line in lines(capsys.readouterr().out)
    ]
    assert [int(found.group(1)) for found in steps] == [3, 6, 8]


def test_by_default_lines_are_ten_seconds_apart(tmp_path, capsys, monkeypatch):
    now = iter(range(0, 10_000, 4))  # four seconds pass at each look at the clock
    monkeypatch.setattr(progress_hook.time, "perf_counter", lambda: float(next(now)))
    hook = ProgressHook()
    taken = [step for step in range(1, 21) if hook._is_time_for_a_line(step, 20)]
    assert taken[0] == 1 and taken[-1] == 20
    assert {later - earlier for earlier, later in itertools.pairwise(taken[:-1])} == {3}


def test_steps_are_optimizer_steps(tmp_path, capsys):
    hook = ProgressHook(interval=1)
    alone(make_runner(tmp_path, accumulative_counts=4, hooks=[hook])).train()
    printed = [line.split()[1] for line in lines(capsys.readouterr().out)]
    assert printed[-1] == "2/2" and set(printed) == {"1/2", "2/2"}


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0:00"), (61, "1:01"), (3599.6, "1:00:00"), (7322, "2:02:02")]
)
def test_a_duration(seconds, shown):
    assert progress_hook._clock(seconds) == shown
