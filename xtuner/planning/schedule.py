"""How long a run is: optimizer steps, tokens, time, and the disk that its checkpoints take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from xtuner.planning.settings import RunSettings

UTILIZATION = 0.4
"""Share of a card's peak that training reaches; published runs lie between 0.3 and 0.55."""


@dataclass(frozen=True)
class Schedule:
    """The length of a run.

    Attributes:
        rows: of the dataset, packed where they are packed; None: not known.
        steps: optimizer steps; None where ``rows`` would be needed.
        tokens: that the run computes, padding included; None likewise.
        seconds: the time, from the card's peak; None likewise, or without a known card.
        checkpoint: bytes of one checkpoint.
        checkpoints: how many are kept at a time.
    """

    rows: int | None
    steps: int | None
    tokens: int | None
    seconds: float | None
    checkpoint: int
    checkpoints: int

    @property
    def disk(self) -> int:
        """Bytes of the checkpoints that are kept."""
        return self.checkpoint * self.checkpoints


def operations_per_token(count: int, trained: int, *, recomputed: float = 0.0) -> float:
    """Operations of a token in forward and backward pass (2 for each parameter and product).

    Args:
        count: parameters that compute a token (of experts, those that are chosen).
        trained: those that have a gradient of their own.
        recomputed: the part of the forward pass that is computed twice.
    """
    forward, backward = 2 * count, 2 * count + 2 * trained
    return float((1 + recomputed) * forward + backward)


def schedule_of(
    settings: RunSettings,
    *,
    rows: int | None,
    operations: float,
    tflops: float | None,
    checkpoint: int,
) -> Schedule:
    """Compute the length of a run.

    Args:
        settings: of the run.
        rows: of the dataset.
        operations: of a token.
        tflops: peak of a card, in 10^12 operations/s.
        checkpoint: bytes of a checkpoint.
    """
    batches = _micro_batches(settings, rows)
    steps = tokens = seconds = None
    if batches is not None:
        steps = math.ceil(batches / settings.accumulative_counts)
        tokens = batches * settings.tokens * settings.replicas
        if tflops:
            seconds = tokens * operations / (tflops * 1e12 * UTILIZATION * settings.sharding.ranks)
    count = 1
    if batches is not None and settings.save_interval:
        count = max(1, math.ceil(batches / settings.save_interval))
    if settings.kept is not None:
        count = min(count, settings.kept)
    return Schedule(rows, steps, tokens, seconds, checkpoint, count)


def _micro_batches(settings: RunSettings, rows: int | None) -> int | None:
    """Of the whole run, on each rank."""
    if settings.iters is not None:
        return settings.iters
    if rows is None or settings.epochs is None:
        return None
    length = math.ceil(rows / (settings.batch_size * settings.replicas))
    return math.ceil(length * settings.epochs)
