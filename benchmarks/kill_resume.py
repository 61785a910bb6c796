"""Kill a training with SIGKILL at random moments, resume it, and compare with one left in peace.

    python benchmarks/kill_resume.py [CONFIG ...] [--rounds 50] [--cfg-options KEY=VALUE ...]

A round is one start of ``xtuner train ... --resume`` and one ``kill -9`` at a random moment of it,
in four of ten while a checkpoint is being written. A training that reaches its end is compared, to
the bit, with the undisturbed one: weights, optimizer, schedules, random states, metrics; then
another one begins. Exit status 1 when anything differed.

The processes are forked from a parent that has everything imported, so that the kills fall into
the training and not into imports. With several (``--processes 2``) all of them are killed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.equivalence.runs import TOY  # noqa: E402
from xtuner.proving.outcome import differences, outcome  # noqa: E402


@dataclass
class Report:
    """What the rounds came to."""

    kills: int = 0
    while_saving: int = 0
    finished: int = 0
    wrong: list[str] = field(default_factory=list)


class FailedError(Exception):
    """A training has ended by itself, and not well."""


@dataclass(frozen=True)
class Training:
    """A command ``xtuner train CONFIG``.

    Args:
        config: name or path.
        options: ``key=value`` words that change it.
        flags: other words, such as ``--fsdp``.
        processes: how many train.
    """

    config: str
    options: Sequence[str] = ()
    flags: Sequence[str] = ()
    processes: int = 1

    def words(self, work_dir: Path, *, resume: bool = False) -> list[str]:
        """The words after ``xtuner``."""
        launcher = ["--launcher", "pytorch"] if self.processes > 1 else []
        options = ["--cfg-options", *self.options] if self.options else []
        common = ["train", self.config, "--work-dir", str(work_dir), *self.flags, *launcher]
        return [*common, *(["--resume"] if resume else []), *options]

    def start(self, work_dir: Path, *, resume: bool = False) -> list[int]:
        """Fork the processes, silent; what they print is in ``<work_dir>.log``.

        Returns:
            Their ids.
        """
        words = self.words(work_dir, resume=resume)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        return [
            _fork(words, work_dir, rank, self.processes, port) for rank in range(self.processes)
        ]


def run(
    training: Training,
    work_dir: Path,
    *,
    resume: bool = False,
    kill_after: float | None = None,
    saving: bool = False,
) -> tuple[bool, float]:
    """Run a training, perhaps killed.

    Args:
        training: the command.
        work_dir: its folder.
        resume: with ``--resume``.
        kill_after: seconds of training after which to kill; None to leave it in peace.
        saving: wait from then on until a checkpoint is being written.

    Returns:
        Whether it finished, and how many seconds of it were training.

    Raises:
        FailedError: when a process ends by itself with another status than 0.
    """
    begun, trains_since = time.time(), None
    running = training.start(work_dir, resume=resume)
    while running:
        time.sleep(0.001)
        running = [pid for pid in running if not _has_ended(pid, running, work_dir)]
        now = time.time()
        if trains_since is None and _has_logged(work_dir, begun):
            trains_since = now
        due = None not in (kill_after, trains_since) and now - trains_since >= kill_after
        if running and due and (not saving or _is_saving(work_dir)):
            kill(running)
            return False, 0.0
    return True, time.time() - (trains_since or begun)


def kill(pids: Sequence[int]) -> None:
    """End processes of this one with SIGKILL, and those that they have started."""
    for each in [each for pid in pids for each in (*_descendants(pid), pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


def _has_ended(pid: int, running: Sequence[int], work_dir: Path) -> bool:
    """Whether a process has ended well; where it has failed, the others are killed.

    Raises:
        FailedError: when it has failed.
    """
    done, code = os.waitpid(pid, os.WNOHANG)
    status = os.waitstatus_to_exitcode(code) if done else 0
    if status != 0:
        kill([other for other in running if other != pid])
        raise FailedError(f"{work_dir.name} ended by itself with status {status}: {work_dir}.log")
    return bool(done)


def _is_saving(work_dir: Path) -> bool:
    return any(work_dir.glob(".*.pth*"))


def _descendants(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [each for child in map(int, children) for each in (*_descendants(child), child)]


def _has_logged(work_dir: Path, since: float) -> bool:
    """Whether a run trains, or is about to: it has written to ``metrics.jsonl``."""
    try:
        status = (work_dir / "metrics.jsonl").stat()
    except OSError:
        return False
    return status.st_size > 0 and status.st_mtime >= since


def _fork(words: Sequence[str], work_dir: Path, rank: int, size: int, port: int) -> int:
    """Run a command in a forked child, in a process group of its own."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        if size > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        log = os.open(f"{work_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from xtuner.entry_point import main

        status = main(words)
        sys.stdout.flush()
    finally:
        os._exit(status)
    return 0


def challenge(training: Training, folder: Path, rounds: int, seed: int) -> Report:
    """Do the rounds for one training."""
    draw = random.Random(seed)
    report = Report()
    try:
        _, seconds = run(training, folder / "peaceful")
        expected = outcome(folder / "peaceful")
        line = f"{folder.name}: {seconds:.2f} s of training, {expected['iter']} iterations"
        print(line, flush=True)
        while report.kills < rounds:
            work_dir = folder / f"disturbed_{report.finished}"
            _disturb(training, work_dir, rounds, seconds, draw, report)
            found = list(differences(expected, outcome(work_dir)))
            report.finished += 1
            report.wrong += [f"{work_dir.name}: {line}" for line in found]
            if not found:
                shutil.rmtree(work_dir)
    except FailedError as error:
        report.wrong.append(str(error))
    return report


def _disturb(
    training: Training,
    work_dir: Path,
    rounds: int,
    seconds: float,
    draw: random.Random,
    report: Report,
) -> None:
    """Kill and resume one training until it reaches its end; count in ``report``."""
    finished = False
    while not finished and report.kills < rounds:
        moment, saving = draw.uniform(0, seconds), draw.random() < 0.4
        finished, _ = run(training, work_dir, resume=True, kill_after=moment, saving=saving)
        report.kills += not finished
        report.while_saving += _is_saving(work_dir)
    if not finished:
        run(training, work_dir, resume=True)


def warm_up() -> None:
    """Import what a training needs, for the forked children."""
    import torch

    torch.set_num_threads(1)
    from xtuner.engine.startup import import_runner

    import_runner(None)
    from xtuner.engine import train  # noqa: F401
    from xtuner.engine.runner import finetune_runner  # noqa: F401


def main(argv: Sequence[str] | None = None) -> int:
    """Do the rounds and print a line for each config."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("configs", nargs="*", metavar="CONFIG", default=[str(TOY)])
    parser.add_argument("--rounds", type=int, default=50, help="kills for each config")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cfg-options", nargs="+", default=[])
    parser.add_argument("--keep", type=Path, help="folder to work in; a temporary one otherwise")
    args = parser.parse_args(argv)
    warm_up()
    wrong = 0
    for config in args.configs:
        folder = args.keep or Path(tempfile.mkdtemp(prefix="kill_resume_"))
        folder.mkdir(parents=True, exist_ok=True)
        training = Training(config, args.cfg_options, processes=args.processes)
        report = challenge(training, folder, args.rounds, args.seed)
        print(
            f"{config}: {report.kills} kills ({report.while_saving} while saving), "
            f"{report.finished} trainings finished, {len(report.wrong)} differences"
        )
        for line in report.wrong[:20]:
            print(f"  {line}")
        wrong += len(report.wrong)
        if not args.keep and not report.wrong:
            shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
