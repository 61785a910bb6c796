"""Work in forked processes: apart from this one's state, and with imports that are done already.

The parent must not have started threads of torch: it only starts and waits.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from xtuner.library_errors import one_line, translate
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

PRELOADED = (
    "datasets",
    "peft",
    "transformers",
    "xtuner.chat.prompt",
    "xtuner.dataset.huggingface",
    "xtuner.engine.hooks",
    "xtuner.engine.runner.training_runner",
    "xtuner.engine.runner.val_loop",
    "xtuner.export.streaming_merge",
    "xtuner.model",
    "xtuner.model.sft",
    "xtuner.proving.export_proofs",
    "xtuner.proving.gradient_proofs",
    "xtuner.planning.plan",
    "xtuner.proving.run_proofs",
    "xtuner.tools.model_converters.merge",
    "xtuner.tools.model_converters.pth_to_hf",
)
"""What the runs of nearly all configs import."""


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        value: what its function returned.
        error: why it returned nothing; None where it did.
        killed: the signal that ended it; 0 for none.
    """

    value: Any = None
    error: UserError | None = None
    killed: int = 0


def preload(*modules: str) -> None:
    """Import what children need, so that they do not, and keep to one thread.

    Args:
        modules: beside those that every run needs.
    """
    import torch

    from xtuner.engine.startup import import_runner

    torch.set_num_threads(1)  # a process with threads of its own cannot be forked safely
    import_runner(None)
    for name in (*PRELOADED, *modules):
        importlib.import_module(name)


class Child:
    """A function that runs in a forked process, as the leader of a process group.

    Args:
        work: the function; what it returns is sent back.
        arguments: its arguments.
        log: the file that gets what it prints, and the traceback of an error.
        environment: variables set for it.
    """

    def __init__(
        self,
        work: Callable[..., Any],
        *arguments: object,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("fork")
        self._log = log
        self._receiver, sender = context.Pipe(duplex=False)
        given = (sender, log, dict(environment or {}), work, arguments)
        self._process = context.Process(target=_run, args=given)
        sys.stdout.flush()
        sys.stderr.flush()
        self._process.start()
        sender.close()

    def wait(self) -> Ended:
        """Wait for its end."""
        try:
            state, value = self._receiver.recv()
        except EOFError:
            state, value = "died", None
        self._process.join()
        if state == "done":
            return Ended(value)
        if state == "died":
            code = self._process.exitcode or 0
            return Ended(error=_died(code, self._log), killed=max(0, -code))
        message, hint, place = value
        return Ended(error=UserError(f"{place}: {message}" if place else message, hint=hint))

    def result(self) -> Any:
        """Wait for its end, and give what it returned.

        Raises:
            UserError: of the child, or that says how it ended.
        """
        ended = self.wait()
        if ended.error is not None:
            raise ended.error
        return ended.value

    def kill(self) -> None:
        """End it, and the processes that it has started."""
        if self._process.is_alive() and self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()


class Group:
    """Children of one piece of work: those that still run at its end are ended."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.kill()

    def start(self, work: Callable[..., Any], *arguments: object, log: Path) -> Child:
        """Start a child; see ``Child``."""
        child = Child(work, *arguments, log=log)
        self._children.append(child)
        return child


def call(work: Callable[..., Any], *arguments: object, log: Path) -> Any:
    """Call a function in a child, and give what it returns; see ``Child``."""
    child = Child(work, *arguments, log=log)
    try:
        return child.result()
    finally:
        child.kill()


def call_together(work: Callable[..., Any], size: int, *arguments: object, log: Path) -> list[Any]:
    """Call a function in the ranks of one process group, as torchrun starts them.

    Args:
        work: called with ``arguments`` on each rank; it joins the group itself.
        size: how many ranks.
        arguments: of the function.
        log: gets what all of them print.

    Returns:
        What each rank returned.

    Raises:
        UserError: of the first rank that failed.
    """
    from xtuner.engine.launch import free_port

    group = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        Child(
            work,
            *arguments,
            log=log.with_name(f"{log.stem}_{rank}{log.suffix}"),
            environment={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]
    try:
        return [rank.result() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def _died(code: int, log: Path) -> UserError:
    if code < 0:
        how = tr("it was killed by signal {number}", number=-code)
    else:
        how = tr("it ended with status {code}", code=code)
    return UserError(
        tr("the process of this stage returned nothing: {how}.", how=how),
        hint=tr("signal 9 often means that memory was short; see {log} (--keep keeps it)", log=log),
    )


def _run(
    sender: Connection,
    log: Path,
    environment: Mapping[str, str],
    work: Callable[..., Any],
    arguments: tuple[object, ...],
) -> None:
    """Be the child."""
    import torch

    os.setsid()
    os.environ.update(environment)
    _redirect(log)
    torch.set_num_threads(1)
    try:
        answer: tuple[str, Any] = ("done", work(*arguments))
    except BaseException as error:
        traceback.print_exc()
        known = translate(error)
        if known is None:
            hint = tr("its traceback is in logs/{name} of --keep FOLDER", name=log.name)
            known = UserError(one_line(error), hint=hint)
        answer = ("failed", (known.message, known.hint, str(known.where or "")))
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send(answer)
    sender.close()
    os._exit(0)  # what the parent registered for its own end is not the child's


def _redirect(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
