"""Being asked to stop or to save, by signals and time limits: at the end of an optimizer step.

SIGINT, SIGTERM and SIGHUP (a closed terminal) stop the run, SIGUSR1 saves and continues.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

import torch
from mmengine.dist import get_world_size, is_main_process

from xtuner.engine.signals import ENDING, SAVING, say, take_save_request
from xtuner.utils.lang import tr

STOPPING = (signal.SIGINT, *ENDING)
OUT_OF_TIME = 0
SAVE = -1
_GO_ON = -2


class Stop:
    """Notes that the run is to stop. The first signal is noted, a second one acts at once.

    A signal that is ignored, as ``nohup`` has SIGHUP ignored, stays ignored.

    Args:
        save_before: stop this many seconds before the time limit of the Slurm job
            (``SLURM_JOB_END_TIME``); None for no heed of it.
    """

    def __init__(self, save_before: float | None = None) -> None:
        self.reason: int | None = None
        self._save = False
        self._deadline = _deadline(save_before)
        self._previous: dict[int, object] = {}

    def install(self) -> None:
        """Take over the signals (in the main thread, where the training runs)."""
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        self._previous[SAVING] = signal.signal(SAVING, self._note_save)
        self._save = take_save_request()

    def uninstall(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def agreed(self) -> int | None:
        """Why all ranks stop now (a signal's number, or ``OUT_OF_TIME``); None to continue.

        ``SAVE`` where they are to save and continue.

        Every rank must ask at the same step: one that is told to stop stops them all.
        """
        if self.reason is None and self._deadline is not None and time.time() >= self._deadline:
            self.reason = OUT_OF_TIME
        wish = self.reason if self.reason is not None else SAVE if self._save else _GO_ON
        self._save = False
        if get_world_size() == 1:
            return None if wish == _GO_ON else wish
        told = torch.tensor(wish)
        if torch.distributed.get_backend() == "nccl":
            told = told.cuda()
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        agreed = int(told.item())
        if agreed == _GO_ON:
            return None  # a signal noted since this rank was asked is told at the next step
        if agreed != SAVE:
            self.reason = agreed
        return agreed

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = number
        for each in STOPPING:
            if signal.getsignal(each) == self._note:
                by_default = signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL
                signal.signal(each, by_default)
        if is_main_process():
            answer = tr(
                "{signal} was received: after this optimizer step a checkpoint is written and the "
                "run ends. A second one ends it at once.",
                signal=signal.Signals(number).name,
            )
            say(answer)

    def _note_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True
        if is_main_process():
            say(tr("SIGUSR1 was received: a checkpoint is written after this optimizer step."))


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
