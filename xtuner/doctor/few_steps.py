"""How many optimizer steps a run takes: too few teach nothing, and nobody is told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from xtuner.utils.lang import tr

FEW_STEPS = 20
"""With fewer optimizer steps hardly anything is learnt."""


def optimizer_steps(rows: int, settings: Mapping[str, Any], processes: int = 1) -> int | None:
    """The optimizer steps of a run; None where its settings do not tell.

    Args:
        rows: of the dataset, packed where they are packed.
        settings: a config's ``train_dataloader``, ``optim_wrapper`` and ``train_cfg``.
        processes: that share the rows.
    """
    loop = settings.get("train_cfg") or {}
    batch = (settings.get("train_dataloader") or {}).get("batch_size", 1)
    counts = (settings.get("optim_wrapper") or {}).get("accumulative_counts", 1)
    epochs, iters = loop.get("max_epochs"), loop.get("max_iters")
    if not all(isinstance(value, int | float) and value > 0 for value in (batch, counts)):
        return None
    if iters is None and epochs is None:
        return None
    micro_batches = iters if iters is not None else math.ceil(rows / batch / processes) * epochs
    return math.ceil(micro_batches / counts)


def few_steps_text(steps: int) -> str:
    """What is wrong with so few steps, and which settings change it."""
    return tr(
        "{steps} optimizer step(s) in all; raise max_epochs, lower accumulative_counts or "
        "batch_size, or do not pack (pack_to_max_length=False)",
        steps=steps,
    )
