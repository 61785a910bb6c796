"""Kill a training with SIGKILL at random moments, resume it, and compare with one left in peace.

    python benchmarks/kill_resume.py [CONFIG ...] [--rounds 50] [--cfg-options KEY=VALUE ...]

A round is one start of ``xtuner train ... --resume`` and one ``kill -9`` at a random moment of it,
in four of ten while a checkpoint is being written. A training that reaches its end is compared, to
the bit, with the undisturbed one: weights, optimizer, schedules, random states, metrics; then
another one begins. Exit status 1 when anything differed.

One process is forked from a parent that has everything imported, so that the kills fall into the
training and not into imports; several processes (``--processes 2``) are started as a user would.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.equivalence.runs import TOY, differences, outcome, start  # noqa: E402


@dataclass
class Report:
    """What the rounds came to."""

    kills: int = 0
    while_saving: int = 0
    finished: int = 0
    wrong: list[str] = field(default_factory=list)


def run(
    words: Sequence[str], processes: int, kill_after: float | None = None, saving: bool = False
) -> tuple[bool, float]:
    """Run ``xtuner train WORDS``, perhaps killed.

    Args:
        words: the config, ``--work-dir``, the folder, and more.
        processes: how many.
        kill_after: seconds of training after which to kill; None to leave it in peace.
        saving: wait from then on until a checkpoint is being written.

    Returns:
        Whether it finished, and how many seconds of it were training.
    """
    begun, trains_since = time.time(), None
    work_dir = Path(words[2])
    if processes == 1:
        pid = _fork(words)
    else:
        log = work_dir.with_name(f"{work_dir.name}.log")
        pid = start(words[0], work_dir, *words[3:], processes=processes, log=log).pid
    while True:
        time.sleep(0.001)
        done, code = os.waitpid(pid, os.WNOHANG)
        now = time.time()
        if trains_since is None and _has_logged(work_dir, begun):
            trains_since = now
        if done:
            break
        due = None not in (kill_after, trains_since) and now - trains_since >= kill_after
        if due and (not saving or _is_saving(work_dir)):
            for each in [*_descendants(pid), pid]:  # torchrun's workers have groups of their own
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False, 0.0
    status = os.waitstatus_to_exitcode(code)
    if status != 0:
        raise SystemExit(f"xtuner train {' '.join(words)}\nended by itself with status {status}")
    return True, now - (trains_since or now)


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


def _fork(words: Sequence[str]) -> int:
    """Run the command in a forked child, silently, in a process group of its own."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        log = os.open(f"{words[2]}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from xtuner.entry_point import main

        status = main(["train", *words])
        sys.stdout.flush()
    finally:
        os._exit(status)
    return 0


def challenge(
    config: str, folder: Path, rounds: int, options: Sequence[str], processes: int, seed: int
) -> Report:
    """Do the rounds for one config."""
    draw = random.Random(seed)
    chosen = ["--cfg-options", *options] if options else []
    peaceful = folder / "peaceful"
    _, seconds = run([config, "--work-dir", str(peaceful), *chosen], processes)
    expected = outcome(peaceful)
    print(f"{config}: {seconds:.2f} s of training, {expected['iter']} iterations", flush=True)
    report, number = Report(), 0
    while report.kills < rounds:
        work_dir = folder / f"disturbed_{number}"
        words = [config, "--work-dir", str(work_dir), "--resume", *chosen]
        finished = False
        while not finished and report.kills < rounds:
            moment, saving = draw.uniform(0, seconds), draw.random() < 0.4
            finished, _ = run(words, processes, moment, saving)
            report.kills += not finished
            report.while_saving += _is_saving(work_dir)
        if not finished:
            run(words, processes)
        found = list(differences(expected, outcome(work_dir)))
        report.finished += 1
        report.wrong += [f"{work_dir.name}: {line}" for line in found]
        if not found:
            shutil.rmtree(work_dir)
        number += 1
    return report


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
    import torch

    torch.set_num_threads(1)
    from xtuner.engine.startup import import_runner

    import_runner(None)
    from xtuner.engine import train  # noqa: F401  (warm, for the forked children)
    from xtuner.engine.runner import finetune_runner  # noqa: F401

    wrong = 0
    for config in args.configs:
        folder = args.keep or Path(tempfile.mkdtemp(prefix="kill_resume_"))
        folder.mkdir(parents=True, exist_ok=True)
        report = challenge(config, folder, args.rounds, args.cfg_options, args.processes, args.seed)
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
