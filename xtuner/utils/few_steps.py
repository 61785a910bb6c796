"""A run of very few optimizer steps learns next to nothing: said before it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from xtuner.utils.lang import N_, translate

MIN_STEPS = 20
"""Below this many optimizer steps a fine-tuning hardly moves the model."""


def few_steps_advice(
    micro_batches: int,
    accumulative_counts: int,
    epoch_length: int | None,
    *,
    counted: str = "run",
) -> str | None:
    """What to set where a run has too few optimizer steps.

    Args:
        micro_batches: of the whole run, on each process.
        accumulative_counts: micro-batches of an optimizer step.
        epoch_length: micro-batches of an epoch; None where the run is given in iterations.
        counted: for what: the ``run`` as it is, ``one process``, or ``at most`` (rows that are
            packed or left out make fewer).

    Returns:
        A sentence with the settings to change; None where there are enough steps.
    """
    steps = math.ceil(micro_batches / accumulative_counts)
    if steps >= MIN_STEPS:
        return None
    count = max(1, micro_batches // MIN_STEPS)
    settings = [f"accumulative_counts = {count}"] if count < accumulative_counts else []
    if micro_batches / count < MIN_STEPS:
        wanted = MIN_STEPS * count
        settings.append(
            f"max_epochs = {math.ceil(wanted / epoch_length)}"
            if epoch_length is not None
            else f"max_iters = {wanted}"
        )
    texts = {
        "run": N_(
            "{steps} optimizer steps are few to learn from; for at least {wanted}: {settings}"
        ),
        "one process": N_(
            "{steps} optimizer steps (with one process; several take fewer) are few to learn from; "
            "for at least {wanted}: {settings}"
        ),
        "at most": N_(
            "at most {steps} optimizer steps (with one process; packing and several processes make "
            "fewer) are few to learn from; for more: {settings}"
        ),
    }
    values = {"steps": steps, "wanted": MIN_STEPS, "settings": ", ".join(settings)}
    return translate(texts[counted]).format(**values)


def few_steps_advice_of(
    rows: int, settings: Mapping[str, Any], *, counted: str = "one process"
) -> str | None:
    """``few_steps_advice`` for a run of one process that is not built.

    Args:
        rows: of the dataset, packed where they are packed.
        settings: a config's ``train_dataloader``, ``optim_wrapper`` and ``train_cfg``.
        counted: as for ``few_steps_advice``; iterations are the same for all.

    Returns:
        None also where the settings do not tell how long the run is.
    """
    loop = settings.get("train_cfg") or {}
    batch_size = (settings.get("train_dataloader") or {}).get("batch_size", 1)
    accumulative_counts = (settings.get("optim_wrapper") or {}).get("accumulative_counts", 1)
    epochs, iters = loop.get("max_epochs"), loop.get("max_iters")
    numbers = (batch_size, accumulative_counts, iters or epochs)
    if not all(isinstance(value, int | float) and value > 0 for value in numbers):
        return None
    if iters:
        return few_steps_advice(iters, accumulative_counts, None)
    epoch_length = math.ceil(rows / batch_size)
    micro_batches = math.ceil(epoch_length * epochs)
    return few_steps_advice(micro_batches, accumulative_counts, epoch_length, counted=counted)
