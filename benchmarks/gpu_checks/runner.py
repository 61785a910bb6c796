"""Runs checks in processes of their own: one that fails, hangs or dies ends no other.

The processes are forked from this one, which has imported the libraries and never touches the GPU
(a process whose parent has used CUDA cannot). Where a library did so at its import, processes are
spawned instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from gpu_checks.items import AbsentError, Item, Result, Setting

LOG = 3000
"""Characters of the log that are kept of a check that fails."""
NO_FORK = "re-initialize CUDA in forked subprocess"
_PR_SET_PDEATHSIG = 1  # of Linux' prctl


@dataclass
class _Running:
    item: Item
    setting: Setting
    process: BaseProcess
    answer: Connection
    is_forked: bool
    begun: float
    end: float

    @property
    def log(self) -> Path:
        return self.setting.folder / "log"

    def result(self) -> Result | None:
        """What came of it; None while it runs."""
        seconds = round(time.monotonic() - self.begun, 1)
        late = Result(self.item.name, "timeout", seconds, {}, why=f"not done after {seconds} s")
        if self.answer.poll():
            with contextlib.suppress(EOFError):
                status, facts, why = self.answer.recv()
                return Result(self.item.name, status, seconds, facts, why)
        if self.process.exitcode is not None:
            why = f"the process ended with status {self.process.exitcode}"
            return replace(late, status="failed", why=why)
        return late if time.monotonic() > self.end else None

    def close(self) -> str:
        """End the process and what it has started; the end of its log."""
        if self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.answer.close()
        log = self.log.read_text("utf-8", "replace")[-LOG:] if self.log.exists() else ""
        shutil.rmtree(self.setting.folder, ignore_errors=True)
        return log


class Runner:
    """Runs checks side by side.

    Args:
        device: ``cuda`` or ``cpu``.
        dry: tiny shapes.
        beside: how many checks run at a time.
        told: is called with each result.
    """

    def __init__(self, device: str, dry: bool, beside: int, told: Callable[[Result], None]) -> None:
        self.device, self.dry, self.beside, self.told = device, dry, beside, told
        self.running: list[_Running] = []
        self.context = multiprocessing.get_context("fork")

    def run(self, items: Sequence[Item], seconds: float) -> list[str]:
        """Run checks in their order; those that use the GPU alone, one after the other.

        Args:
            items: the checks.
            seconds: time limit of all together.

        Returns:
            The names of those that were not started, or were stopped, at the time limit.
        """
        end, waiting = time.monotonic() + seconds, list(items)
        try:
            while (waiting or self.running) and time.monotonic() < end:
                for item in [item for item in waiting if self._may_start(item)]:
                    if self._may_start(item):
                        waiting.remove(item)
                        self._start(item)
                answers = [each.answer for each in self.running]
                multiprocessing.connection.wait(answers, timeout=0.1)
                waiting = self._collect() + waiting
            return [each.item.name for each in self.running] + [item.name for item in waiting]
        finally:
            for each in self.running:
                each.close()
            self.running = []

    def _may_start(self, item: Item) -> bool:
        if len(self.running) >= self.beside:
            return False
        on_gpu = [each.item for each in self.running if not each.item.on_cpu]
        if item.on_cpu or not on_gpu:
            return True
        return not item.alone and not any(other.alone for other in on_gpu)

    def _start(self, item: Item) -> None:
        folder = Path(tempfile.mkdtemp(prefix="gpu_check_"))
        setting = Setting(self.device, self.dry, folder)
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = self.context.Process(target=_be, args=(item, setting, theirs, os.getpid()))
        process.start()
        theirs.close()
        begun = time.monotonic()
        limit = item.seconds * (6 if self.dry else 1)  # two slow cores
        forked = self.context.get_start_method() == "fork"
        self.running.append(_Running(item, setting, process, ours, forked, begun, begun + limit))

    def _collect(self) -> list[Item]:
        """Report the checks that have ended; those to be run again."""
        again = []
        for each in list(self.running):
            result = each.result()
            if result is None:
                continue
            self.running.remove(each)
            log = each.close()
            if NO_FORK in result.why and each.is_forked:
                self.context = multiprocessing.get_context("spawn")
                again.append(each.item)
                continue
            self.told(result if result.is_final else replace(result, log=log))
        return again


def _be(item: Item, setting: Setting, answer: Connection, parent: int) -> None:
    """Run a check, in its process."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    log = os.open(setting.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    # not those of a test that captures them
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    os.chdir(setting.folder)
    try:
        facts = item.check(setting)
    except AbsentError as error:
        answer.send(("absent", {}, str(error)))
    except BaseException as error:
        traceback.print_exc()
        what = f"{type(error).__name__}: {error}"
        answer.send(("failed", {}, what[:500]))
    else:
        answer.send(("wrong" if facts.get("wrong") else "ok", facts, ""))
    answer.close()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)  # a lost CUDA context may hang at exit
