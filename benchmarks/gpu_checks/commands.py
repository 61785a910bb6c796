"""Stage 1: the commands of a user: train, kill, resume, convert, chat; two processes on one GPU."""

from __future__ import annotations

import json
import math
import os
import runpy
import signal
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from gpu_checks.items import Facts, Item, Setting

LARGEST_GAP = 2e-2
"""Relative difference of the losses of two runs; on a GPU sums have no fixed order."""
NAME = "小调"
"""What the quickstart's model learns to call itself."""
LOG_ALL, NO_SAMPLES = "default_hooks.logger.interval=1", "custom_hooks=[]"
"""Options of ``train``: the loss of each step, no sample outputs."""
SHORT = "train_dataloader.dataset.max_length=64"
QUESTION = "请做一下自我介绍\nexit\n"
ROOT = Path(__file__).parents[2]


class Command:
    """``xtuner WORDS`` in a forked process, in the process group of this one.

    Args:
        folder: the working directory.
        words: the words after ``xtuner``.
        stdin: the text of standard input.
        variables: of the environment, beside those of this process.
    """

    count = 0

    def __init__(
        self,
        folder: Path,
        *words: str,
        stdin: str = "",
        variables: Mapping[str, str] | None = None,
    ) -> None:
        Command.count += 1
        self.words = words
        self.log = folder / f"command_{Command.count}.log"
        (folder / "stdin").write_text(stdin, "utf-8")
        self.pid = os.fork()
        if not self.pid:
            _be(folder, words, self.log, variables or {})

    @property
    def output(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def wait(self) -> str:
        """Its output, once it has ended.

        Raises:
            RuntimeError: when it has failed.
        """
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if status:
            raise RuntimeError(f"xtuner {' '.join(self.words)}: {status}: {self.output[-400:]}")
        return self.output

    def kill_when(self, file: str, folder: Path) -> bool:
        """Kill it once there is a file of this pattern; whether it was still running."""
        while not any(folder.glob(file)):
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                return False
            time.sleep(0.001)
        os.kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == -signal.SIGKILL


def _be(folder: Path, words: tuple[str, ...], log: Path, variables: Mapping[str, str]) -> None:
    """Be the command, in the forked process."""
    status = 1
    try:
        os.chdir(folder)
        os.environ |= {"XTUNER_LANG": "en", "XTUNER_CACHE": str(folder / "cache"), **variables}
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]  # of processes that it starts
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        os.dup2(os.open(folder / "stdin", os.O_RDONLY), 0)
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.argv = ["xtuner", *words]
        runpy.run_module("xtuner", run_name="__main__", alter_sys=False)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def quickstart(setting: Setting, name: str) -> Facts:
    """Train; train again, kill, resume; convert; chat. Both runs have the same losses."""
    folder = setting.folder
    options = [LOG_ALL, f"default_hooks.checkpoint.interval={2 if setting.dry else 16}"]
    options += [*_steps(4), NO_SAMPLES, SHORT] if setting.dry else []
    train = ["train", name, "--cfg-options", *options, "--work-dir"]
    Command(folder, *train, "whole").wait()
    killed = Command(folder, *train, "part").kill_when("iter_*.pth", folder / "part")
    Command(folder, *train, "part", "--resume").wait()
    whole, part = _losses(folder / "whole"), _losses(folder / "part")
    gap = _largest_gap(whole, part)
    checkpoint = max((folder / "part").glob("iter_*.pth"), key=lambda path: int(path.stem[5:]))
    Command(folder, "convert", "pth_to_hf", name, str(checkpoint), "hf").wait()
    adapter = (folder / "hf" / "adapter_config.json").exists()
    model = ["work_dirs/quickstart_base", "--adapter", "hf"] if adapter else ["hf"]
    words = ["chat", *model, "--prompt-template", "internlm2_chat", "--max-new-tokens", "32"]
    answer = Command(folder, *words, stdin=QUESTION).wait()
    return {
        "killed in training": killed,
        "steps": len(whole),
        "losses": [round(whole[min(whole)], 3), round(whole[max(whole)], 3)],
        "largest gap of the losses": gap,
        "answers its name": NAME in answer,
        "wrong": not (killed and gap <= LARGEST_GAP and (setting.dry or NAME in answer)),
    }


def two_processes(setting: Setting) -> Facts:
    """Two processes on one GPU (gloo) have the losses of one that accumulates two batches.

    NCCL refuses two processes on one GPU: with it there is one.
    """
    from xtuner.engine.launch import free_port

    folder = setting.folder
    steps = 3 if setting.dry else 8
    options = [LOG_ALL, NO_SAMPLES, SHORT, "param_scheduler=None", *_steps(steps)]
    train = ["train", "quickstart_lora", "--cfg-options", *options]
    one = [*train, "optim_wrapper.accumulative_counts=2", *_steps(2 * steps)]
    Command(folder, *one, "--work-dir", "one").wait()

    def ranks(count: int, backend: str) -> None:
        words = [*train, f"env_cfg.dist_cfg.backend={backend}", "--launcher", "pytorch"]
        group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        started = [
            Command(
                folder,
                *words,
                *("--work-dir", backend),
                variables={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(count)
        ]
        for each in started:
            each.wait()

    ranks(2, "gloo")
    if setting.device == "cuda":
        ranks(1, "nccl")
    alone, both = _losses(folder / "one"), _losses(folder / "gloo")
    gap = _largest_gap(dict(enumerate(alone.values())), dict(enumerate(both.values())))
    return {"steps": len(both), "largest gap of the losses": gap, "wrong": not gap <= LARGEST_GAP}


def _steps(count: int) -> list[str]:
    """Options of ``train``: so many micro-batches."""
    return [f"train_cfg.max_iters={count}", "train_cfg.max_epochs=None"]


def _losses(folder: Path) -> dict[int, float]:
    """The loss of each iteration; of the last run where it was computed twice."""
    text = (folder / "metrics.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return {line["iter"]: line["loss"] for line in lines if "loss" in line}


def _largest_gap(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """The largest relative difference; infinite where other steps were made."""
    if not one or one.keys() != other.keys():
        return float("inf")
    gaps = [abs(one[step] - other[step]) / one[step] for step in one]
    return max(gaps) if all(map(math.isfinite, gaps)) else float("inf")


def items(dry: bool) -> list[Item]:
    """The checks of this file; in a dry run one quickstart."""
    names = ("quickstart",) if dry else ("quickstart", "quickstart_qlora")
    found = [Item(f"commands/{name}", 1, partial(quickstart, name=name), 120) for name in names]
    return [*found, Item("commands/two processes", 1, two_processes, 90)]
