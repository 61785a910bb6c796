"""Being asked to stop: SIGTERM, SIGINT and time limits, heeded at the end of an optimizer step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

import torch
from mmengine.dist import get_world_size

from xtuner.utils.lang import tr

SIGNALS = (signal.SIGTERM, signal.SIGINT)
OUT_OF_TIME = 0


class Stop:
    """Notes that the run is to stop. The first signal is noted, a second one acts at once.

    Args:
        save_before: stop this many seconds before the time limit of the Slurm job
            (``SLURM_JOB_END_TIME``); None for no heed of it.
    """

    def __init__(self, save_before: float | None = None) -> None:
        self.reason: int | None = None
        self._deadline = _deadline(save_before)
        self._previous: dict[int, object] = {}

    def install(self) -> None:
        """Take over the signals (in the main thread, where the training runs)."""
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)

    def uninstall(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def agreed(self) -> int | None:
        """Why all ranks stop now (a signal's number, or ``OUT_OF_TIME``); None to go on.

        Every rank must ask at the same step: one that is told to stop stops them all.
        """
        if self.reason is None and self._deadline is not None and time.time() >= self._deadline:
            self.reason = OUT_OF_TIME
        if get_world_size() == 1:
            return self.reason
        told = torch.tensor(-1 if self.reason is None else self.reason)
        if torch.distributed.get_backend() == "nccl":
            told = told.cuda()
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        if told.item() < 0:
            return None  # a signal noted since this rank was asked is told at the next step
        self.reason = int(told.item())
        return self.reason

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = number
        self.uninstall()


def exit_status(reason: int) -> int:
    """The exit status of a run that stopped: 130 or 143 after a signal, 75 when out of time."""
    return 75 if reason == OUT_OF_TIME else 128 + reason


def told(reason: int) -> str:
    """Why the run stopped, in words."""
    if reason == OUT_OF_TIME:
        return tr("the time limit is near")
    return tr("{signal} was received", signal=signal.Signals(reason).name)


def _deadline(save_before: float | None) -> float | None:
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if save_before is None or not end.isdigit():
        return None
    return int(end) - save_before
