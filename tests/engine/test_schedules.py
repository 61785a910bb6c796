"""The learning rate of an optimizer step, however the step is cut into micro-batches and ranks."""

from __future__ import annotations

import math

import pytest
import torch
from mmengine.optim import (
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    StepLR,
)
from mmengine.registry import PARAM_SCHEDULERS

from tests.engine.toy import make_runner, metrics
from xtuner.engine.schedules import RunLength, in_optimizer_steps, is_too_short
from xtuner.utils.errors import UserError

LR = 0.1
WARMUP = dict(type=LinearLR, start_factor=1e-5, begin=0)
COSINE = dict(type=CosineAnnealingLR, eta_min=0.0)
EPOCHS = 3
STEPS = 40  # of an epoch


def published(warmup_ratio=0.1):
    """As in published configs."""
    boundary = warmup_ratio * EPOCHS
    units = dict(by_epoch=True, convert_to_iter_based=True)
    return [WARMUP | units | dict(end=boundary), COSINE | units | dict(begin=boundary, end=EPOCHS)]


def in_epochs(schedule, **lengths):
    return [dict(type=schedule, by_epoch=True, convert_to_iter_based=True, **lengths)]


def rates(schedules, run: RunLength) -> list[float]:
    """The learning rate of each optimizer step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    built = []
    for schedule in schedules:
        settings = in_optimizer_steps(schedule, run)
        if not is_too_short(settings):
            built.append(PARAM_SCHEDULERS.build(settings, default_args={"optimizer": optimizer}))
    found = []
    for _ in range(run.steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for schedule in built:
            schedule.step()
    return found


def run_of(micro_batches_a_step: int) -> RunLength:
    """The run whose steps are cut into so many micro-batches, on each rank."""
    length = STEPS * micro_batches_a_step
    return RunLength(EPOCHS * length, length, micro_batches_a_step)


SCHEDULES = {
    "published": published(),
    "step": in_epochs(StepLR, step_size=1, gamma=0.5),
    "multi step": in_epochs(MultiStepLR, milestones=[1, 2], gamma=0.5),
    "one cycle": in_epochs(OneCycleLR, eta_max=1.0, total_steps=EPOCHS),
    "exponential": in_epochs(ExponentialLR, gamma=0.99, end=EPOCHS),
    "cosine of a period": in_epochs(CosineAnnealingLR, T_max=1, eta_min=0.0),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("cut", [2, 3, 4, 16])
def test_accumulation_does_not_change_the_rate_of_a_step(name, cut):
    # 2 ranks without accumulation have the micro-batches of 1 rank with accumulation over half as
    # many: they are the same case
    alone = rates(SCHEDULES[name], run_of(1))
    assert rates(SCHEDULES[name], run_of(cut)) == alone
    assert len(set(alone)) > 2


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_iterations_are_micro_batches_as_in_max_iters(cut):
    boundary, end = 8 * cut, EPOCHS * STEPS * cut
    schedules = [
        WARMUP | dict(by_epoch=False, end=boundary),
        COSINE | dict(by_epoch=False, begin=boundary, end=end),
    ]
    found = rates(schedules, RunLength(end, None, cut))
    assert found == rates(published(8 / (EPOCHS * STEPS)), run_of(1))


def test_without_accumulation_it_is_mmengines_schedule():
    settings = published()[1]
    ours = in_optimizer_steps(settings, RunLength(120, 40, 1))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    theirs = PARAM_SCHEDULERS.build(
        settings, default_args=dict(optimizer=optimizer, epoch_length=40)
    )
    mine = PARAM_SCHEDULERS.build(ours, default_args=dict(optimizer=optimizer))
    names = ("begin", "end", "T_max", "by_epoch")
    assert [getattr(mine, n) for n in names] == [getattr(theirs, n) for n in names]


@pytest.mark.parametrize("accumulation", [2, 7, 40])
def test_a_schedule_ends_with_the_run_where_steps_do_not_divide_it(accumulation):
    run = RunLength(75, 25, accumulation)
    warmup, cosine = (in_optimizer_steps(each, run) for each in published())
    assert cosine["end"] == run.steps == math.ceil(75 / accumulation)
    assert cosine["begin"] == warmup["end"] == int(0.3 * 25 / accumulation)


def test_a_warmup_that_ends_within_the_last_micro_batch_does_not_take_the_run():
    run = RunLength(micro_batches=5, epoch_length=5, accumulative_counts=1, max_epochs=1)
    warmup, cosine = (
        in_optimizer_steps(each | dict(end=each["end"] / EPOCHS), run) for each in published(0.9)
    )
    assert (warmup["begin"], warmup["end"]) == (0, 4)
    begin = COSINE | dict(by_epoch=True, convert_to_iter_based=True, begin=0.9, end=1)
    assert [in_optimizer_steps(begin, run)[name] for name in ("begin", "end")] == [4, 5]
    assert cosine["end"] == 5


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_schedule_ends_with_a_run_over_a_fraction_of_an_epoch(accumulation, tmp_path):
    # half of 25 rows: 13 micro-batches; the schedule's 12.5 are the whole run
    schedule = [COSINE | dict(by_epoch=True, convert_to_iter_based=True, end=0.5)]
    settings = dict(rows=25, batch_size=1, accumulative_counts=accumulation, schedule=schedule)
    make_runner(tmp_path, max_epochs=0.5, **settings).train()
    found = [line["lr"] for line in metrics(tmp_path)]
    steps = math.ceil(13 / accumulation)
    expected = [LR * (1 + math.cos(math.pi * n / steps)) / 2 for n in range(steps)]
    assert found == pytest.approx(expected, abs=1e-9)


def test_epochs_of_a_stream_are_refused():
    with pytest.raises(UserError, match="no length"):
        in_optimizer_steps(published()[0], RunLength(100, None, 1))


def test_a_run_of_one_step_has_the_full_rate(tmp_path):
    schedule = published(0.03)
    make_runner(
        tmp_path, rows=24, accumulative_counts=1000, schedule=schedule, max_epochs=1
    ).train()
    (line,) = metrics(tmp_path)
    assert line["lr"] == pytest.approx(LR)


@pytest.mark.parametrize("by_epoch", [False, True], ids=["by step", "by epoch"])
def test_trained_runs_have_the_same_rates(tmp_path, by_epoch):
    schedule = [COSINE | dict(by_epoch=True, end=EPOCHS, convert_to_iter_based=not by_epoch)]
    found = []
    for number, (batch, accumulation) in enumerate([(4, 1), (2, 2), (1, 4)]):
        folder = tmp_path / str(number)
        runner = make_runner(
            folder,
            rows=24,
            batch_size=batch,
            accumulative_counts=accumulation,
            schedule=schedule,
            max_epochs=EPOCHS,
        )
        runner.train()
        found.append([line["lr"] for line in metrics(folder)])
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == (EPOCHS if by_epoch else EPOCHS * 6)


def test_an_epoch_that_ends_within_a_step_changes_the_rate_after_it(tmp_path):
    schedule = [dict(type=StepLR, step_size=1, gamma=0.5, by_epoch=True)]
    make_runner(tmp_path, rows=5, accumulative_counts=2, schedule=schedule, max_epochs=3).train()
    # 15 micro-batches; epochs end after 5 (in the third step), 10 and 15
    expected = [0.1] * 3 + [0.05] * 2 + [0.025] * 3
    assert [line["lr"] for line in metrics(tmp_path)] == pytest.approx(expected)
