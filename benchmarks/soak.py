"""A long run, and kills with SIGKILL in every way to train: is anything lost, does anything grow?

    nice -n 15 python benchmarks/soak.py --folder FOLDER [--only NAME ...] [--kills 4] [--dry]

* ``long``: 3,000 steps of a tiny model with saving, sample answers and logs. Memory, open files,
  files in the work dir, bytes of logs and CPU seconds of each tenth of the run are compared; then
  the run is resumed from one and from nine tenths of it: both starts cost the same, steps cost the
  same, and the end is the same to the bit.
* the others: a way to train each, killed at random moments and resumed as in ``kill_resume.py``.

Each part's result is kept in FOLDER, so that a soak which was interrupted goes on with the next
one. ``results/soak.json`` and ``results/soak.md`` are the report; exit status 1 when anything was
found. ``--dry`` takes a few steps and kills, and writes the report into FOLDER.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from kill_resume import Training, challenge, kill, warm_up  # noqa: E402
from measuring import RESULTS, machine  # noqa: E402

from tests.helpers.tiny import save_tiny  # noqa: E402
from tests.helpers.vision_language import save_clip, save_square  # noqa: E402
from xtuner.proving.outcome import differences, outcome  # noqa: E402

TESTS = ROOT / "tests"
LLAVA = "llava_vicuna_7b_v15_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune"
TENTHS = 10
LOGS = {".jsonl", ".json", ".log"}
ANSWERS = "eval_outputs_"
"""Files of sample answers, one for each time that they are generated."""
GROWTH_MIB, SLOWER, MORE_BYTES = 8, 1.3, 1.1
"""Bounds of the last tenth of a long run, compared with its third tenth."""
GROW = ("memory_mib", "open_files", "files", "log_bytes_per_step", "cpu_seconds_per_step")


def trainings(folder: Path) -> dict[str, Training]:
    """The ways to train that are killed, by name.

    Args:
        folder: with what ``prepare`` has written.
    """
    language = str(TESTS / "equivalence" / "scale_config.py")
    preference = str(TESTS / "engine" / "dpo_config.py")
    base = f"base={str(folder / 'base')!r}"
    one = [base, "steps=40", "accumulative_counts=2", "default_hooks.checkpoint.interval=8"]
    two = [base, "steps=20", "accumulative_counts=2", "default_hooks.checkpoint.interval=8"]
    lora, qlora = ["adapter=True"], ["adapter=True", "bits=True"]
    pairs = [base, "adapter=True", "steps=24"]
    zero3 = ["--deepspeed", "deepspeed_zero3"]
    images = [
        f"llm_name_or_path={folder / 'base'}",
        f"visual_encoder_name_or_path={folder / 'clip'}",
        f"data_path={folder / 'rows.json'}",
        f"image_folder={folder / 'images'}",
        f"evaluation_images={folder / 'images' / '1.png'}",
        *("batch_size=2", "accumulative_counts=1", "dataloader_num_workers=0", "max_length=64"),
        *("max_epochs=2", "save_steps=3", "optim_wrapper.dtype=float32", "pretrained_pth=None"),
        "custom_hooks.1.max_new_tokens=4",  # of sample answers, which would take the most time
        "randomness.seed=3",  # a run that is killed before its first checkpoint draws another one
    ]
    return {
        "full": Training(language, one),
        "lora": Training(language, [*one, *lora]),
        "qlora": Training(language, [*one, *qlora]),
        "dpo": Training(preference, pairs),
        "images": Training(LLAVA, images),
        "full, 2 processes": Training(language, two, processes=2),
        "lora, 2 processes": Training(language, [*two, *lora], processes=2),
        "qlora, 2 processes": Training(language, [*two, *qlora], processes=2),
        "dpo, 2 processes": Training(preference, pairs, processes=2),
        "images, 2 processes": Training(LLAVA, images, processes=2),
        "full, FSDP": Training(language, two, ["--fsdp"], processes=2),
        "lora, FSDP": Training(language, [*two, *lora], ["--fsdp"], processes=2),
        "full, ZeRO-3": Training(language, two, zero3, processes=2),
        "lora, ZeRO-3": Training(language, [*two, *lora], zero3, processes=2),
    }


def prepare(folder: Path) -> None:
    """Write models, pictures and rows, unless they are there."""
    if (folder / "rows.json").exists():
        return
    save_tiny(folder / "base", initializer_range=0.2)
    save_clip(folder / "clip")
    rows = []
    for number in range(16):
        color = "red" if number % 2 else "blue"
        save_square(folder / "images" / f"{number}.png", color)
        ask = {"from": "human", "value": "<image>\nWhat is the capital color?"}
        answer = {"from": "gpt", "value": color}
        rows.append({"image": f"{number}.png", "conversations": [ask, answer]})
    (folder / "rows.json").write_text(json.dumps(rows), "utf-8")


@dataclass(frozen=True)
class Sample:
    """What a run held at a moment: its iterations, and what may not grow with them."""

    iterations: int
    memory_mib: float
    open_files: int
    files: int
    log_bytes: int
    cpu_seconds: float


class Watched:
    """A training in a process that is looked at until it ends.

    Args:
        training: the command; of one process.
        work_dir: its folder.
        resume: with ``--resume``.
    """

    def __init__(self, training: Training, work_dir: Path, *, resume: bool = False) -> None:
        self.samples: list[Sample] = []
        self._work_dir = work_dir
        (self._pid,) = training.start(work_dir, resume=resume)
        self._process = psutil.Process(self._pid)

    def until(self, iterations: int | None = None, keep: Sequence[Path] = ()) -> None:
        """Look at it until it ends, or has done so many iterations and is killed.

        Args:
            iterations: None to wait for its end.
            keep: work dirs of which each gets a copy of the checkpoint that its name says
                (``iter_300``), as if this run had been killed after it.
        """
        while self._process.status() != psutil.STATUS_ZOMBIE:
            self._look()
            for copy in keep:
                self._copy_checkpoint(copy)
            if iterations and self.samples and self.samples[-1].iterations >= iterations:
                break
            time.sleep(0.05)
        kill([self._pid])

    def _look(self) -> None:
        metrics = self._work_dir / "metrics.jsonl"
        done = _last_iteration(metrics)
        if done is None or (self.samples and done == self.samples[-1].iterations):
            return
        own = [path for path in self._work_dir.rglob("[!.]*") if path.is_file()]
        logs = [path for path in own if path.suffix in LOGS]
        logs += [Path(f"{self._work_dir}.log")]
        try:
            with self._process.oneshot():
                times = self._process.cpu_times()
                sample = Sample(
                    iterations=done,
                    memory_mib=self._process.memory_info().rss / 2**20,
                    open_files=self._process.num_fds(),
                    files=sum(not path.name.startswith(ANSWERS) for path in own),
                    log_bytes=sum(log.stat().st_size for log in logs),
                    cpu_seconds=times.user + times.system,
                )
        except (psutil.Error, OSError):  # it has just ended, or has just replaced a file
            return
        self.samples.append(sample)

    def _copy_checkpoint(self, copy: Path) -> None:
        checkpoint = self._work_dir / f"{copy.name}.pth"
        manifest = checkpoint.with_name(f"{checkpoint.name}.json")
        if copy.exists() or not manifest.exists():
            return
        copy.mkdir()
        for file in (checkpoint, manifest, self._work_dir / "metrics.jsonl"):
            shutil.copy(file, copy)


def _last_iteration(metrics: Path) -> int | None:
    """The iteration of the last whole line of ``metrics.jsonl``."""
    try:
        with metrics.open("rb") as stream:
            stream.seek(max(0, metrics.stat().st_size - 4096))
            lines = stream.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["iter"])
    except (OSError, ValueError, IndexError, KeyError):
        return None


def in_tenths(samples: Sequence[Sample], steps: int) -> list[dict[str, float]]:
    """The samples of each tenth of a run: medians, and what a step has cost."""
    tenths = []
    for number in range(TENTHS):
        low, high = (steps * place // TENTHS for place in (number, number + 1))
        part = [sample for sample in samples if low < sample.iterations <= high]
        if len(part) < 2:
            continue
        first, last = part[0], part[-1]
        count = last.iterations - first.iterations
        tenths.append(
            {
                "to_step": high,
                "memory_mib": statistics.median(sample.memory_mib for sample in part),
                "open_files": statistics.median(sample.open_files for sample in part),
                "files": statistics.median(sample.files for sample in part),
                "log_bytes_per_step": (last.log_bytes - first.log_bytes) / count,
                "cpu_seconds_per_step": (last.cpu_seconds - first.cpu_seconds) / count,
            }
        )
    return tenths


def grown(part: dict[str, Any]) -> list[str]:
    """What was more at the end of a long run than early in it, or costs more once it is resumed.

    Args:
        part: ``tenths`` and ``resumed`` of ``long_run``.
    """
    tenths, resumed = part["tenths"], part["resumed"]
    early, late = tenths[2], tenths[-1]
    bounds = {name: early[name] for name in GROW}
    bounds["memory_mib"] += GROWTH_MIB
    bounds["log_bytes_per_step"] *= MORE_BYTES
    bounds["cpu_seconds_per_step"] *= SLOWER
    step = statistics.median(tenth["cpu_seconds_per_step"] for tenth in tenths)
    start = resumed["early"]["cpu_seconds_to_first_step"]
    return [
        *(
            f"{name} was {early[name]:.4g} and became {late[name]:.4g}"
            for name, bound in bounds.items()
            if late[name] > bound
        ),
        *(
            f"resumed late: {name} {resumed['late'][name]:.3g}, expected {expected:.3g}"
            for name, expected in (
                ("cpu_seconds_per_step", step),
                ("cpu_seconds_to_first_step", start),
            )
            if resumed["late"][name] > SLOWER * expected
        ),
    ]


def long_run(base: Path, folder: Path, steps: int) -> dict[str, Any]:
    """The long run, and the same run resumed from one tenth and from nine tenths of it.

    Args:
        base: folder of the model.
        folder: to work in.
        steps: of the run.
    """
    every = max(1, steps // 30)
    options = [
        f"pretrained_model_name_or_path={base}",
        *("train_cfg.max_epochs=None", f"train_cfg.max_iters={steps}", f"save_steps={every}"),
        *(f"evaluation_freq={every}", "custom_hooks.1.max_new_tokens=4", "max_length=64"),
        "optim_wrapper.dtype=float32",
    ]
    training = Training("quickstart", options)
    places = {name: steps * part // TENTHS for name, part in (("early", 1), ("late", 9))}
    copies = {name: folder / name / f"iter_{place}" for name, place in places.items()}
    for copy in copies.values():
        copy.parent.mkdir()
    whole = Watched(training, folder / "whole")
    whole.until(keep=[*copies.values()])
    tenths = in_tenths(whole.samples, steps)
    expected, costs = outcome(folder / "whole"), {}
    for name, copy in copies.items():
        resumed = Watched(training, copy, resume=True)
        resumed.until(2 * places[name] if name == "early" else None)
        later = [sample for sample in resumed.samples if sample.iterations > places[name]]
        costs[name] = {
            "cpu_seconds_to_first_step": later[0].cpu_seconds,
            "cpu_seconds_per_step": (later[-1].cpu_seconds - later[0].cpu_seconds)
            / (later[-1].iterations - later[0].iterations),
        }
    result: dict[str, Any] = {"steps": steps, "tenths": tenths, "resumed": costs}
    lost = list(differences(expected, outcome(copies["late"])))
    return result | {"wrong": [*grown(result), *lost]}


def killed(training: Training, folder: Path, kills: int) -> dict[str, Any]:
    """The kills of one way to train."""
    report = challenge(training, folder, kills, seed=0)
    return {
        "kills": report.kills,
        "while_saving": report.while_saving,
        "finished": report.finished,
        "wrong": report.wrong,
    }


def write_report(folder: Path, parts: dict[str, Any], not_run: Sequence[str] = ()) -> None:
    """Write ``soak.json`` and ``soak.md``.

    Args:
        folder: where to.
        parts: their results, by name.
        not_run: the names of the others.
    """
    facts = machine("torch", "transformers", "mmengine", "peft", "bitsandbytes", "deepspeed")
    facts["kills"] = sum(part.get("kills", 0) for part in parts.values())
    (folder / "soak.json").write_text(json.dumps(facts | {"parts": parts}, indent=1) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = ["# Soak", "", f"{facts['date']}; {facts['machine']}; {versions}.", ""]
    if "long" in parts:
        lines += _long_table(parts["long"])
    lines += ["| killed | kills | while saving | finished | differences | date |", "|---" * 6 + "|"]
    for name, part in parts.items():
        if "kills" in part:
            counts = (part["kills"], part["while_saving"], part["finished"], len(part["wrong"]))
            shown = " | ".join(map(str, (*counts, part["date"])))
            lines.append(f"| {name} | {shown} |")
    wrong = [f"* {name}: {line}" for name, part in parts.items() for line in part["wrong"][:20]]
    lines += ["", *(wrong or ["Nothing was lost, nothing has grown."])]
    if not_run:
        lines += ["", f"Not run: {'; '.join(not_run)}."]
    (folder / "soak.md").write_text("\n".join(lines) + "\n", "utf-8")


def _long_table(part: dict[str, Any]) -> list[str]:
    """The tenths of the long run, and what it cost to resume it."""
    names = [name for name in part["tenths"][0] if name != "to_step"]
    lines = [f"| to step | {' | '.join(name.replace('_', ' ') for name in names)} |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for tenth in part["tenths"]:
        lines.append(
            f"| {tenth['to_step']} | {' | '.join(f'{tenth[name]:.4g}' for name in names)} |"
        )
    lines.append("")
    for name, costs in part["resumed"].items():
        shown = ", ".join(f"{cost.replace('_', ' ')} {value:.3g}" for cost, value in costs.items())
        lines.append(f"Resumed {name}: {shown}.")
    return [*lines, "", f"Measured on {part['date']}.", ""]


def main(argv: Sequence[str] | None = None) -> int:
    """Do the parts that are not done yet, and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="to work in, and to go on in")
    parser.add_argument("--only", nargs="+", help="parts; all by default")
    parser.add_argument("--steps", type=int, default=3000, help="of the long run")
    parser.add_argument("--kills", type=int, default=4, help="for each way to train")
    parser.add_argument("--dry", action="store_true", help="a few steps and kills")
    args = parser.parse_args(argv)
    steps, kills = (60, 1) if args.dry else (args.steps, args.kills)
    folder: Path = args.folder.resolve()
    (folder / "results").mkdir(parents=True, exist_ok=True)
    warm_up()
    prepare(folder)
    killable = trainings(folder)
    for name in args.only or ["long", *killable]:
        result, work = folder / "results" / f"{name}.json", folder / "runs" / name
        if result.exists():
            continue
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        found = (
            long_run(folder / "base", work, steps)
            if name == "long"
            else killed(killable[name], work, kills)
        )
        found["date"] = time.strftime("%Y-%m-%d")
        result.write_text(json.dumps(found, indent=1))
        print(f"{name}: {'; '.join(found['wrong'][:3]) or 'nothing lost'}", flush=True)
        if not found["wrong"]:
            shutil.rmtree(work)
    files = {name: folder / "results" / f"{name}.json" for name in ("long", *killable)}
    parts = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    not_run = [name for name in files if name not in parts]
    write_report(folder if args.dry else RESULTS, parts, not_run)
    return 1 if any(part["wrong"] for part in parts.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
