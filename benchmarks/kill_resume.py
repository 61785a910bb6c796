"""Kill a training with SIGKILL at random moments, resume it, and compare with one left in peace.

    python benchmarks/kill_resume.py [CONFIG ...] [--rounds 50] [--cfg-options KEY=VALUE ...]

A round is one start of ``xtuner train ... --resume`` and one ``kill -9`` at a random moment of it,
also while a checkpoint is being written. A training that reaches its end is compared, to the bit,
with the undisturbed one: weights, optimizer, schedules, random states, metrics; then another one
begins. Exit status 1 when anything differed.

One process is forked from a parent that has everything imported, so that the kills fall into the
training and not into imports; several processes (``--processes 2``) are started as a user would.
"""

from __future__ import annotations

import argparse
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


def run(words: Sequence[str], kill_after: float | None, processes: int) -> tuple[bool, float]:
    """Run ``xtuner train WORDS``, killed after so many seconds. Returns (finished, seconds)."""
    begun = time.monotonic()
    if processes == 1:
        pid = _fork(words)
    else:
        config, _, work_dir, *rest = words
        pid = start(config, Path(work_dir), *rest, processes=processes).pid
    status = None
    while status is None:
        time.sleep(0.002)
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        elif kill_after is not None and time.monotonic() - begun >= kill_after:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False, time.monotonic() - begun
    if status != 0:
        raise SystemExit(f"xtuner train {' '.join(words)}\nended by itself with status {status}")
    return True, time.monotonic() - begun


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
    _, seconds = run([config, "--work-dir", str(peaceful), *chosen], None, processes)
    expected = outcome(peaceful)
    print(f"{config}: {seconds:.1f} s undisturbed, {expected['iter']} iterations", flush=True)
    report, number = Report(), 0
    while report.kills < rounds:
        work_dir = folder / f"disturbed_{number}"
        words = [config, "--work-dir", str(work_dir), "--resume", *chosen]
        finished = False
        while not finished and report.kills < rounds:
            finished, _ = run(words, draw.uniform(0, seconds), processes)
            report.kills += not finished
            report.while_saving += any(work_dir.glob(".*.pth.*"))
        if not finished:
            run(words, None, processes)
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
