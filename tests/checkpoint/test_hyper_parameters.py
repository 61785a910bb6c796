"""Settings that the config changes take effect; all else goes on to the bit."""

import copy

import pytest
import torch
from mmengine.optim import CosineAnnealingLR, LinearLR, ReduceOnPlateauLR
from torch import nn

from xtuner.checkpoint.hyper_parameters import Position, Restored, initial_groups
from xtuner.checkpoint.serialize import to_serializable
from xtuner.engine.optim import FinetuneOptimWrapper
from xtuner.utils.errors import UserError

EPOCH = 4
DONE = 9


class Run:
    """An optimizer with a warm-up by iteration and a cosine by epoch."""

    def __init__(self, *, eta_min: float = 0.0, epochs: int = 6, schedules=None, **settings):
        torch.manual_seed(0)
        self.net = nn.Linear(3, 2)
        settings = {"lr": 0.1, "weight_decay": 0.01, "betas": (0.9, 0.999), **settings}
        self.optim = FinetuneOptimWrapper(torch.optim.AdamW(self.net.parameters(), **settings))
        self.schedulers = (
            [
                LinearLR(self.optim, start_factor=0.1, by_epoch=False, begin=0, end=5),
                CosineAnnealingLR(
                    self.optim, eta_min=eta_min, by_epoch=True, begin=0, T_max=epochs
                ),
            ]
            if schedules is None
            else schedules(self.optim)
        )
        self.initial = initial_groups(self.optim)

    def train(self, start: int = 0, stop: int = DONE) -> list[float]:
        rates = []
        for done in range(start + 1, stop + 1):
            self.optim.backward(self.net(torch.ones(1, 3)).sum())
            self.optim.step()
            self.optim.zero_grad()
            rates.append(self.optim.param_groups[0]["lr"])
            for scheduler in self.schedulers:
                if not scheduler.by_epoch or done % EPOCH == 0:
                    scheduler.step()
        return rates

    def state(self) -> dict:
        return to_serializable(
            copy.deepcopy(
                {
                    "optimizer": self.optim.state_dict(),
                    "hyper_parameters": self.initial,
                    "param_schedulers": [each.state_dict() for each in self.schedulers],
                }
            )
        )

    def resume(self, state: dict, *, optimizer: bool = True, moved: bool = False) -> "Run":
        restored = Restored(self.optim, self.schedulers)
        if optimizer:
            self.optim.load_state_dict(state["optimizer"])
        position = Position(DONE, EPOCH, moved=moved)
        restored.apply(state, position, has_optimizer=optimizer)
        return self


def trained(**settings) -> dict:
    run = Run(**settings)
    run.train()
    return run.state()


def groups(run: Run) -> list[dict]:
    return [{k: v for k, v in g.items() if k != "params"} for g in run.optim.param_groups]


def test_without_a_change_everything_is_restored():
    whole = Run()
    whole.train()
    state = whole.state()
    resumed = Run().resume(state)
    assert groups(resumed) == groups(whole)
    assert resumed.train(DONE, 20) == whole.train(DONE, 20)


def test_schedules_computed_anew_are_those_of_the_run_to_the_bit():
    whole = Run()
    whole.train()
    resumed = Run().resume(whole.state(), moved=True)
    assert groups(resumed) == groups(whole)
    assert resumed.train(DONE, 20) == whole.train(DONE, 20)


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.5},
        {"eta_min": 0.02},
        {"epochs": 10},
        {"lr": 0.3, "weight_decay": 0.2, "betas": (0.8, 0.99), "eps": 1e-6},
    ],
)
def test_a_change_takes_effect_as_if_it_had_been_so_from_the_start(change):
    other = Run(**change)
    other.train()
    resumed = Run(**change).resume(trained())
    assert groups(resumed) == groups(other)
    assert resumed.train(DONE, 20) == other.train(DONE, 20)
    assert resumed.optim.optimizer.state[resumed.net.weight]["step"] == 20  # progress is kept


def test_the_moments_are_those_of_the_checkpoint():
    state = trained()
    resumed = Run(lr=0.5, betas=(0.5, 0.9)).resume(state)
    found = resumed.optim.optimizer.state[resumed.net.weight]["exp_avg"]
    assert torch.equal(found, state["optimizer"]["state"][0]["exp_avg"])


def test_without_schedules_the_rate_is_that_of_the_config():
    resumed = Run(lr=0.5, schedules=lambda optim: []).resume(trained(schedules=lambda optim: []))
    assert resumed.train(DONE, 12) == [0.5] * 3


def test_schedules_that_are_taken_away_or_added():
    without = Run(schedules=lambda optim: []).resume(trained())
    assert without.train(DONE, 12) == [0.1] * 3
    other = Run()
    other.train()
    added = Run().resume(trained(schedules=lambda optim: []))
    assert added.train(DONE, 12) == other.train(DONE, 12)


def test_without_the_optimizers_state_the_schedule_is_where_it_was():
    whole = Run()
    whole.train()
    resumed = Run().resume(whole.state(), optimizer=False)
    assert resumed.train(DONE, 12) == whole.train(DONE, 12)


def test_a_checkpoint_that_does_not_name_its_settings():
    state = trained()
    del state["hyper_parameters"]  # as before this version
    other = Run(lr=0.5, weight_decay=0.3)
    other.train()
    assert groups(Run(lr=0.5, weight_decay=0.3).resume(state)) == groups(other)


def test_what_an_optimizer_counts_in_its_groups_is_progress():
    """Prodigy, for example, keeps its estimate of the distance there."""
    whole = Run()
    whole.train()
    whole.optim.param_groups[0]["d"] = 0.25
    state = whole.state()
    state["hyper_parameters"][0]["d"] = 1e-6
    fresh = Run(lr=0.5)
    fresh.optim.param_groups[0]["d"] = 1e-6
    fresh.resume(state)
    assert fresh.optim.param_groups[0]["d"] == 0.25


def test_a_schedule_by_metrics_cannot_be_computed_anew():
    def plateau(optim):
        return [ReduceOnPlateauLR(optim, by_epoch=True)]

    state = trained(schedules=lambda optim: [])
    kept = Run(schedules=plateau)
    state["param_schedulers"] = to_serializable([each.state_dict() for each in kept.schedulers])
    kept.resume(state)
    with pytest.raises(UserError, match="depends on past metrics"):
        Run(lr=0.5, schedules=plateau).resume(state)


def test_a_schedule_that_counted_micro_batches_goes_on_in_steps():
    """A checkpoint of an earlier version, whose schedules advanced with each micro-batch."""
    accumulation, length = 2, 6

    def warmup(end):
        return lambda optim: [
            LinearLR(optim, start_factor=0.1, by_epoch=False, begin=0, end=end),
            CosineAnnealingLR(optim, eta_min=0.0, by_epoch=True, begin=0, T_max=4),
        ]

    def train(run, micro_batches, step_of):
        for done in range(1, micro_batches + 1):
            run.schedulers[0].step() if done % step_of == 0 else None
            run.schedulers[1].step() if done % length == 0 else None
        return run

    before = train(Run(schedules=warmup(10)), 8, step_of=1)
    wanted = train(Run(schedules=warmup(5)), 8, step_of=accumulation)
    resumed = Run(schedules=warmup(5))
    state = before.state()
    restored = Restored(resumed.optim, resumed.schedulers)
    resumed.optim.load_state_dict(state["optimizer"])
    position = Position(8, length, accumulative_counts=accumulation)
    restored.apply(state, position, has_optimizer=True)
    found, expected = (run.optim.param_groups[0]["lr"] for run in (resumed, wanted))
    assert found == expected != before.optim.param_groups[0]["lr"]


@pytest.mark.parametrize("done", [8, 20])
def test_a_reduced_rate_is_kept_when_an_earlier_version_counted_micro_batches(done):
    """As above; the warm-up has ended, in micro-batches and in steps, or only in micro-batches."""
    accumulation = 2

    def schedules(end):
        return lambda optim: [
            LinearLR(optim, start_factor=0.1, by_epoch=False, begin=0, end=end),
            ReduceOnPlateauLR(optim, by_epoch=True, monitor="loss", patience=0, factor=0.5),
        ]

    before = Run(schedules=schedules(7))
    for _ in range(done):
        before.schedulers[0].step()
    for loss in (1.0, 2.0, 3.0):
        before.schedulers[1].step()
        before.schedulers[1].step({"loss": loss})
    state = before.state()
    del state["hyper_parameters"]
    resumed = Run(schedules=schedules(5))
    restored = Restored(resumed.optim, resumed.schedulers)
    resumed.optim.load_state_dict(state["optimizer"])
    position = Position(done, EPOCH, accumulative_counts=accumulation)
    if done < 10:
        with pytest.raises(UserError, match="depends on past metrics"):
            restored.apply(state, position, has_optimizer=True)
        return
    restored.apply(state, position, has_optimizer=True)
    assert resumed.optim.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)
    warmup, plateau = (each.state_dict() for each in resumed.schedulers)
    assert warmup["_global_step"] == done // accumulation
    assert plateau["best"] == 1.0 and plateau["_global_step"] == 3
    resumed.schedulers[1].step({"loss": 4.0})
    assert resumed.optim.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)
