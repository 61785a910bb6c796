"""Schedules of hyper-parameters count optimizer steps.

Configs give their ends in epochs or, like ``max_iters``, in micro-batches. So the number of
micro-batches that make up a step, or of ranks that share it, does not change the step's learning
rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmengine.optim.scheduler.param_scheduler import INF

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

ENDS = ("begin", "end", "total_steps")
"""Settings that are a place in the run."""
LENGTHS = ("T_max", "step_size", "milestones", "periods")
"""Settings that are a number, or numbers, of iterations or epochs."""


@dataclass(frozen=True)
class RunLength:
    """How long a run is.

    Args:
        micro_batches: of each rank, in the whole run.
        epoch_length: micro-batches of an epoch; None for a stream.
        accumulative_counts: micro-batches of an optimizer step.
        max_epochs: epochs as the config gives them, from which ``micro_batches`` was rounded up;
            None where it gives iterations.
    """

    micro_batches: int
    epoch_length: int | None
    accumulative_counts: int
    max_epochs: float | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps, a last short one counted."""
        return math.ceil(self.micro_batches / self.accumulative_counts)

    def ends_at(self, place: float) -> bool:
        """Whether a place in micro-batches is the end of the run, before or after rounding up."""
        ends = [float(self.micro_batches)]
        if self.max_epochs is not None and self.epoch_length is not None:
            ends.append(self.max_epochs * self.epoch_length)
        return any(math.isclose(place, end, rel_tol=0, abs_tol=1e-6) for end in ends)


def in_optimizer_steps(scheduler: Mapping[str, Any], run: RunLength) -> dict[str, Any]:
    """Convert a schedule's settings to optimizer steps.

    Args:
        scheduler: the config of a schedule of mmengine.
        run: the run that it is for.

    Returns:
        The settings with ``by_epoch=False`` and all numbers in optimizer steps, or, for a schedule
        that changes at the ends of epochs (``by_epoch=True`` without ``convert_to_iter_based``), as
        they are.

    Raises:
        UserError: when epochs are to be converted and the data have no length.
    """
    settings = dict(scheduler)
    by_epoch = settings.get("by_epoch", True)
    convert = settings.pop("convert_to_iter_based", False)
    if by_epoch and not convert:
        return settings
    unit = 1
    if by_epoch:
        if run.epoch_length is None:
            raise UserError(
                tr("the data has no length (a stream), so epochs of a schedule have no meaning."),
                hint=tr("set by_epoch=False and give begin and end in iterations."),
                where=Where(key="param_scheduler"),
            )
        unit = run.epoch_length

    def place(value: float) -> int:
        if run.ends_at(value * unit):
            return run.steps
        return int(value * (unit / run.accumulative_counts))

    for name in ENDS:
        if settings.get(name) is not None and settings[name] < INF:
            settings[name] = place(settings[name])
    for name in LENGTHS:
        value = settings.get(name)
        if isinstance(value, list | tuple):
            settings[name] = [max(1, place(item)) for item in value]
        elif value is not None:
            settings[name] = max(1, place(value))
    return {"end": run.steps, **settings, "by_epoch": False}


def is_too_short(scheduler: Mapping[str, Any]) -> bool:
    """Whether a schedule has fewer than the two steps that it needs to get anywhere."""
    end = scheduler.get("end")
    return end is not None and end - scheduler.get("begin", 0) < 2
