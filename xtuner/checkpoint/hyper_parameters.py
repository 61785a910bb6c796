"""Hyper-parameters are the config's, progress is the checkpoint's.

An optimizer's parameter groups and the schedules hold both. A value that the config sets as it did
when the checkpoint was written is restored, so that a run continues bit for bit; one that the
config sets otherwise is the config's, and the schedules are then computed anew up to the
restored step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from xtuner.checkpoint.serialize import to_serializable
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

Group = dict[str, Any]

PROGRESS = {"last_step", "_global_step", "_last_value", "best", "num_bad_epochs"}
PROGRESS |= {"cooldown_counter"}
"""What a schedule of mmengine counts; all else in its state is a setting."""
STANDARD = ("lr", "betas", "eps", "weight_decay", "momentum")
"""Settings of checkpoints that do not say which values their config had set."""


class Scheduler(Protocol):
    """What we use of mmengine's schedules."""

    param_name: str
    by_epoch: bool

    def step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class HasGroups(Protocol):
    """An optimizer, or what wraps it."""

    @property
    def param_groups(self) -> list[Group]: ...


@dataclass(frozen=True)
class Position:
    """How far a run is.

    Args:
        iterations: micro-batches that are done.
        epoch_length: micro-batches of an epoch; None for a stream.
        moved: whether this is not where the checkpoint was written, as an epoch has another length.
        accumulative_counts: micro-batches of an optimizer step.
    """

    iterations: int
    epoch_length: int | None
    moved: bool = False
    accumulative_counts: int = 1


def initial_groups(optim: HasGroups) -> list[Group]:
    """The settings of the parameter groups as the config has them, whatever was scheduled since."""
    return [
        {
            name: to_serializable(group.get(f"initial_{name}", value))
            for name, value in group.items()
            if name != "params" and not name.startswith("initial_")
        }
        for group in optim.param_groups
    ]


class Restored:
    """Restores schedules and settings; made before the optimizer's state is restored.

    Args:
        optim: the optimizer as it was built, with its schedules at their first step.
        schedulers: the schedules, as they were built.
    """

    def __init__(self, optim: HasGroups, schedulers: Sequence[Scheduler]) -> None:
        self.optim, self.schedulers = optim, schedulers
        self._built = [_without_parameters(group) for group in optim.param_groups]
        self._initial = initial_groups(optim)

    def apply(self, state: Mapping[str, Any], position: Position, *, has_optimizer: bool) -> None:
        """Set schedules and settings, after the optimizer's state is restored.

        Args:
            state: the checkpoint's, with ``param_schedulers`` and ``hyper_parameters``.
            position: of the resumed run.
            has_optimizer: whether the checkpoint had the optimizer's state.

        Raises:
            UserError: when a schedule that depends on metrics would have to be computed anew.
        """
        saved = state.get("param_schedulers", [])
        by_metrics = {each.param_name for each in self.schedulers if _depends_on_metrics(each)}
        before = state.get("hyper_parameters") or _presumed(self.optim, self._initial, by_metrics)
        for group, now, then in zip(self.optim.param_groups, self._initial, before, strict=True):
            changed = [name for name in now if not _same(now[name], then.get(name))]
            if by_metrics.intersection(changed):
                raise _cannot_compute()
            group.update({name: now[name] for name in changed})
        in_place = has_optimizer and not position.moved
        if in_place and self._schedules_are(saved):
            for scheduler, progress in zip(self.schedulers, saved, strict=True):
                scheduler.load_state_dict(dict(progress))
            return
        self._compute_schedules(position, saved if in_place else [])

    def _schedules_are(self, saved: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the schedules are those that the checkpoint was written with."""
        now = [_settings(scheduler.state_dict()) for scheduler in self.schedulers]
        return _same(now, [_settings(each) for each in saved])

    def _compute_schedules(self, position: Position, saved: Sequence[Mapping[str, Any]]) -> None:
        """Step the schedules from their first step to the position, as a run would have.

        Those that depend on metrics keep what they have reduced (see ``_keep_reduced``).

        Args:
            position: of the resumed run.
            saved: the schedules' states in the checkpoint, as far as they are still true.
        """
        by_metrics = [each for each in self.schedulers if _depends_on_metrics(each)]
        reduced = {
            each.param_name: [group[each.param_name] for group in self.optim.param_groups]
            for each in by_metrics
        }
        for group, built in zip(self.optim.param_groups, self._built, strict=True):
            for mark in [key for key in {**group, **built} if key.startswith("initial_")]:
                group.pop(mark, None)
                for key in (mark, mark.removeprefix("initial_")):
                    if key in built:
                        group[key] = built[key]
        computed = [each for each in self.schedulers if each not in by_metrics]
        by_step = [each for each in computed if not each.by_epoch]
        by_epoch = [each for each in computed if each.by_epoch]
        epochs = 0
        for begun in range(0, position.iterations, position.accumulative_counts):
            done = min(begun + position.accumulative_counts, position.iterations)
            _step(by_step)
            for _ in range(epochs, done // (position.epoch_length or done + 1)):
                _step(by_epoch)
                epochs += 1
        for each in by_metrics:
            self._keep_reduced(each, reduced[each.param_name], saved)

    def _keep_reduced(
        self,
        scheduler: Scheduler,
        values: Sequence[float],
        saved: Sequence[Mapping[str, Any]],
    ) -> None:
        """Restore a schedule that depends on metrics beside others that were computed anew.

        That is exact once the others have ended: only this one has changed the value since.

        Args:
            scheduler: as it was built.
            values: what it schedules, in the checkpoint, of each parameter group.
            saved: the schedules' states in the checkpoint.

        Raises:
            UserError: when its settings have changed, or another schedule has not ended.
        """
        own = _settings(scheduler.state_dict())
        progress = next((each for each in saved if _same(own, _settings(each))), None)
        now = [each.state_dict() for each in self.schedulers if each is not scheduler]
        others = [each for each in (*now, *saved) if each is not progress]
        running = [each for each in others if each["_global_step"] < each["end"]]
        if progress is None or any(each["param_name"] == scheduler.param_name for each in running):
            raise _cannot_compute()
        scheduler.load_state_dict(dict(progress))
        for group, value in zip(self.optim.param_groups, values, strict=True):
            group[scheduler.param_name] = value


def _depends_on_metrics(scheduler: Scheduler) -> bool:
    """Whether this is a ReduceOnPlateau schedule."""
    return "num_bad_epochs" in scheduler.state_dict()


def _cannot_compute() -> UserError:
    return UserError(
        tr(
            "the learning rate or its schedules have changed, and what a ReduceOnPlateau schedule "
            "does depends on past metrics."
        ),
        hint=tr(
            "undo the change, or start a new run from the weights: "
            "--cfg-options load_from=CHECKPOINT"
        ),
    )


def _step(schedulers: Iterable[Scheduler]) -> None:
    for scheduler in schedulers:
        scheduler.step()


def _without_parameters(group: Group) -> Group:
    return {name: value for name, value in group.items() if name != "params"}


def _presumed(
    optim: HasGroups, initial: Sequence[Group], by_metrics: Collection[str]
) -> list[Group]:
    """The settings of a checkpoint that does not name them: those of its parameter groups."""
    known = [name for name in STANDARD if name not in by_metrics]
    return [
        {**now, **{name: then[name] for name in known if name in then}}
        for now, then in zip(initial, initial_groups(optim), strict=True)
    ]


def _settings(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in PROGRESS}


def _same(one: object, other: object) -> bool:
    """Whether two values are equal once they have been in a file."""
    one, other = to_serializable(one), to_serializable(other)
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
