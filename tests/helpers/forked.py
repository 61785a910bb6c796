"""Commands in processes of their own that need not import torch, transformers and peft again.

They are forked from a server that has imported these (``multiprocessing``'s fork server), which
saves seconds for each. What a fresh interpreter does is tested where a test uses ``subprocess``.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

import pytest

from xtuner.engine.launch import free_port

ROOT = Path(__file__).parents[2]
LIMIT = 500
"""Seconds that a process may take on a loaded machine; less than pytest's limit of a test."""


class Forked:
    """``python WORDS`` in a forked process, with the interface of ``subprocess.Popen``.

    Args:
        words: ``-m MODULE ...`` or a script and its arguments.
        folder: the working directory; that of this process by default.
        stdin: the text of standard input.
        environment: variables added to those of this process.
    """

    running: list[Forked] = []

    def __init__(
        self,
        *words: str | Path,
        folder: Path | None = None,
        stdin: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.args = [str(word) for word in words]
        self._files = Path(tempfile.mkdtemp(prefix="forked_"))
        for name, text in (("stdin", stdin), ("stdout", ""), ("stderr", "")):
            (self._files / name).write_text(text, "utf-8")
        ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        variables = {**os.environ, **ours, **(environment or {})}
        arguments = (self.args, str(folder or Path.cwd()), variables, str(self._files))
        self._process = server().Process(target=_run, args=arguments)
        self._process.start()
        Forked.running.append(self)

    @property
    def pid(self) -> int:
        """The number of the process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status; -N where signal N ended it; None while it runs."""
        return self._process.exitcode

    poll = returncode.fget

    @property
    def stdout(self) -> str:
        """What it has printed until now."""
        return (self._files / "stdout").read_text("utf-8")

    @property
    def stderr(self) -> str:
        """What it has printed to standard error until now."""
        return (self._files / "stderr").read_text("utf-8")

    def wait(self, timeout: float = LIMIT) -> int:
        """Wait for its end, which has to come before the time limit; give the exit status."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise AssertionError(f"not done after {timeout} s: {self.stdout}{self.stderr}")
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, and the processes that it has started in its group."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()


def run(*words: str | Path, status: int = 0, **how: object) -> Forked:
    """Run a command to its end and assert its exit status."""
    process = Forked(*words, **how)  # type: ignore[arg-type]
    assert process.wait() == status, process.stdout[-3000:] + process.stderr[-3000:]
    return process


def run_ranks(
    size: int, *words: str | Path, folder: Path | None = None, **environment: str
) -> list[Forked]:
    """Run a command as the ranks of one process group, as torchrun would start them.

    When one fails the others are ended.
    """
    group = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), **environment}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        Forked(
            *words, folder=folder, environment={**group, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
        )
        for rank in range(size)
    ]
    wait_together(ranks)
    said = "\n".join(rank.stdout[-3000:] + rank.stderr[-3000:] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0] * size, said
    return ranks


def wait_together(processes: Sequence[Forked], timeout: float = LIMIT) -> None:
    """Wait until all have ended; when one fails, or the time is up, end the others."""
    deadline = time.monotonic() + timeout
    while any(each.returncode is None for each in processes):
        failed = any(each.returncode for each in processes)
        if failed or time.monotonic() > deadline:
            time.sleep(2 if failed else 0)  # the others may say more about it
            for each in processes:
                each.kill()
        time.sleep(0.02)


def wait_for(happened: Callable[[], bool], run: subprocess.Popen[str] | Forked) -> None:
    """Wait until something has happened, which has to be while a process runs."""
    wait_until(lambda: happened() or run.poll() is not None)
    if not happened():
        run.kill()
        said = run.stdout if isinstance(run, Forked) else run.communicate()[0]
        raise AssertionError(f"status {run.poll()}: {said}")


def wait_until(happened: Callable[[], bool]) -> bool:
    """Wait until something has happened, or the time is up; give whether it has."""
    deadline = time.monotonic() + LIMIT
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)
    return happened()


def end_all() -> None:
    """End the processes that a test has left."""
    while Forked.running:
        process = Forked.running.pop()
        process.kill()
        shutil.rmtree(process._files)


def server() -> multiprocessing.context.ForkServerContext:
    """``multiprocessing``'s context whose server has done the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.preloaded"])
    with pytest.MonkeyPatch.context() as patch:  # what counts while the server imports
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        forkserver.ensure_running()
    return context


def _run(words: list[str], folder: str, variables: dict[str, str], files: str) -> None:
    """Be ``python WORDS``, in the forked process."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        file = os.open(f"{files}/{name}", os.O_RDWR | (os.O_APPEND if number else 0))
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", line_buffering=True)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
