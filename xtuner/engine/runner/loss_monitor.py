"""Losses that are not finite or jump: noticed, traced to the rows they came from, acted upon."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from mmengine.dist import all_gather_object, is_main_process

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

Action = Literal["stop", "skip", "continue"]
ACTIONS = ("stop", "skip", "continue")

FILE = "bad_rows.jsonl"
REMEMBERED = 64
ENOUGH = 16
SHOWN_ROWS = 8


class LossMonitor:
    """Judges the loss of each optimizer step before the step is taken.

    A loss is a spike when it lies above the median of the last 64 by more than ten times their
    median distance from it, and is more than double that median.

    Args:
        on_bad_loss: what to do when loss or gradients are not finite.
        on_spike: what to do about a spike.
    """

    def __init__(self, on_bad_loss: Action = "stop", on_spike: Action = "continue") -> None:
        for name, action in (("on_bad_loss", on_bad_loss), ("on_spike", on_spike)):
            if action not in ACTIONS:
                raise UserError(
                    tr("{name} is {action!r}.", name=name, action=action),
                    hint=tr("choose one of {actions}.", actions=ACTIONS),
                )
        self._on_bad_loss = on_bad_loss
        self._on_spike = on_spike
        self.recent: deque[float] = deque(maxlen=REMEMBERED)

    def check(self, loss: float, grad_norm: float, *, scaled: bool) -> tuple[str, Action] | None:
        """Judge one step.

        Args:
            loss: mean loss over the whole step and all ranks.
            grad_norm: norm of the gradients.
            scaled: the loss is scaled (fp16), so that an overflow of the gradients is the loss
                scaler's business.

        Returns:
            What is wrong and what to do, or None when all is well.
        """
        if not math.isfinite(loss):
            return tr("the loss is {loss}", loss=loss), self._on_bad_loss
        if not math.isfinite(grad_norm) and not scaled:
            return (
                tr(
                    "the gradient norm is {grad_norm} at a loss of {loss:.4g}",
                    grad_norm=grad_norm,
                    loss=loss,
                ),
                self._on_bad_loss,
            )
        usual = self._usual()
        self.recent.append(loss)
        if usual is not None and loss > max(usual[0] + 10 * usual[1], 2 * usual[0]):
            return (
                tr("the loss jumped to {loss:.4g} (usual: {usual:.4g})", loss=loss, usual=usual[0]),
                self._on_spike,
            )
        return None

    def _usual(self) -> tuple[float, float] | None:
        if len(self.recent) < ENOUGH:
            return None
        middle = statistics.median(self.recent)
        return middle, statistics.median(abs(loss - middle) for loss in self.recent)


def rows_of_step(traced: Sequence[Sequence[Any]], losses: Sequence[float]) -> list[dict[str, Any]]:
    """The rows of a step, of all ranks; only those of micro-batches without a finite loss, if any.

    Args:
        traced: for each micro-batch of this rank its rows, as ``file:line``.
        losses: for each micro-batch its share of the step's loss.
    """
    rows = [
        {"row": row, "loss_share": loss}
        for batch, loss in zip(traced, losses, strict=True)
        for row in batch
    ]
    everywhere = list(itertools.chain.from_iterable(all_gather_object(rows)))
    return [row for row in everywhere if not math.isfinite(row["loss_share"])] or everywhere


def report(
    what: str,
    action: Action,
    *,
    rows: list[dict[str, Any]],
    iteration: int,
    work_dir: str,
    warn: Callable[[str], None],
) -> None:
    """Write the rows of a bad step to ``work_dir/bad_rows.jsonl`` and name them.

    Raises:
        UserError: when ``action`` is ``stop``.
    """
    path = Path(work_dir) / FILE
    if is_main_process():
        with path.open("a", encoding="utf-8") as stream:
            entry = {"iter": iteration, "what": what, "action": action, "rows": rows}
            stream.write(json.dumps(entry, ensure_ascii=False, default=str) + "\n")
    message = _told(what, iteration, rows, path)
    if action != "stop":
        warn(message)
        return
    raise UserError(
        message,
        hint=tr(
            "look at these rows; a smaller lr or bfloat16 often helps. To leave such steps out: "
            "--cfg-options train_cfg.on_bad_loss=skip"
        ),
    )


def _told(what: str, iteration: int, rows: list[dict[str, Any]], path: Path) -> str:
    """One message for people: what, when, which rows, and where all of them are."""
    named = [str(row["row"]) for row in rows[:SHOWN_ROWS]]
    more = f", ... ({len(rows)})" if len(rows) > SHOWN_ROWS else ""
    listed = ", ".join(named) + more if named else tr("(not known)")
    return tr(
        "iteration {iteration}: {what}. Rows of this step: {listed}. Written to {path}",
        iteration=iteration,
        what=what,
        listed=listed,
        path=path,
    )
