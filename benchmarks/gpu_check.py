"""Is XTuner right on this GPU, how fast is it, and how much memory does it take?

    python benchmarks/gpu_check.py [--stage 1 2] [--only qwen2_5_7b/lora ...] [--seconds 540]

Stage 1 (three minutes): attention kernels, loss, full, LoRA, QLoRA, liger-kernel, torch.compile and
float16 against the plain computation on the CPU; train, kill, resume, convert, chat; two processes.
Stage 2 (six minutes): the loss beside liger-kernel's and torch's; tokens/s, share of the measured
matmul rate and peak memory of models of 1.5B to 8B with random weights, beside what ``xtuner plan``
says of the memory, and beside TRL and a plain loop.

Each check is a process of its own with a time limit. Results are kept in ``--results`` as
``gpu_check.json``, a table as ``gpu_check.md``: a second call goes on with what is missing or was
not right. Status 0: nothing is wrong; 1: something is, or the time was over; 2: there is no GPU.

``--dry`` runs all of it on a CPU with tiny shapes. A machine without a network gets what it lacks
as a zip file, see ``gpu_checks/packages.py``: ``--packages FILE``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from gpu_checks.items import Facts, Item, Result, Results  # noqa: E402
from gpu_checks.runner import Runner  # noqa: E402
from gpu_checks.table import line, tables  # noqa: E402

LIBRARIES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "trl")
LIBRARIES += ("accelerate", "datasets", "mmengine", "flash-attn", "flash-attn-3", "flash-attn-4")
SECONDS = 540
BESIDE = 4
"""Checks at a time, on a GPU."""
IMPORTED = (
    "datasets",
    "peft",
    "transformers.models.qwen2.modeling_qwen2",
    "xtuner.engine.runner.finetune_runner",
    "xtuner.engine.train",
    "xtuner.model.sft",
)
"""What most checks need; nothing of it may use the GPU."""


def unpack(file: Path) -> None:
    """Make the packages of a zip file importable, in processes that are started too."""
    folder = tempfile.mkdtemp(prefix="gpu_check_packages_")
    zipfile.ZipFile(file).extractall(folder)
    sys.path.insert(0, folder)
    paths = [folder, os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def machine(device: str) -> Facts:
    """The GPU, and the versions of the libraries that are there."""
    facts: Facts = {"device": device}
    if device == "cuda":
        query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        done = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, check=False)
        facts["gpu"] = (done.stdout.strip().splitlines() or ["?"])[0]
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    return facts


def all_items(dry: bool) -> list[Item]:
    """The checks of both stages, in the order in which they run."""
    from gpu_checks import commands, correctness, losses, speeds

    return [*correctness.items(), *commands.items(dry), *losses.items(), *speeds.items(dry)]


def import_libraries() -> None:
    """Import what most checks need, once for all processes."""
    from xtuner.engine.startup import import_runner

    import_runner(None)
    for name in IMPORTED:
        importlib.import_module(name)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stage", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument(
        "--only", nargs="+", default=[""], help="checks whose name has one of these in it"
    )
    parser.add_argument("--seconds", type=float, help=f"in all (default: {SECONDS}; --dry: none)")
    parser.add_argument("--results", type=Path, help="folder (default: results; --dry: a new one)")
    parser.add_argument("--packages", type=Path, help="zip file of Python packages")
    parser.add_argument("--again", action="store_true", help="forget earlier results")
    parser.add_argument("--list", action="store_true", help="print the checks and end")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU")
    return parser.parse_args()


def main() -> int:
    """Run the checks that are missing and print the table."""
    args = parse()
    if args.packages:
        unpack(args.packages)
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # leaves CUDA alone, so that processes can fork
    }.items():
        os.environ.setdefault(name, value)
    if args.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    device = "cpu" if args.dry else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu_check.py needs a GPU; here torch sees none.", file=sys.stderr)
        return 2
    import_libraries()
    items = [
        item
        for item in all_items(args.dry)
        if item.stage in args.stage and any(part in item.name for part in args.only)
    ]
    if args.list:
        print("\n".join(f"{item.stage} {item.name}" for item in items))
        return 0
    return check(args, device, items)


def check(args: argparse.Namespace, device: str, items: list[Item]) -> int:
    """Run checks; the exit status."""
    kept = HERE / "results"
    folder = args.results or (Path(tempfile.mkdtemp(prefix="gpu_check_")) if args.dry else kept)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "gpu_check.json"
    if args.again:
        file.unlink(missing_ok=True)
    results = Results(file, machine(device))
    waiting = [
        item
        for item in items
        if item.name not in results.found or not results.found[item.name].is_final
    ]

    def told(result: Result) -> None:
        results.add(result)
        print(line(result), flush=True)

    seconds = args.seconds or (float("inf") if args.dry else SECONDS)
    missing = Runner(device, args.dry, 2 if args.dry else BESIDE, told).run(waiting, seconds)
    found = [results.found[item.name] for item in items if item.name in results.found]
    text = tables(results.machine, found, missing)
    file.with_suffix(".md").write_text(text, "utf-8")
    print(f"\n{text}")
    return int(bool(missing) or any(not result.is_final for result in found))


if __name__ == "__main__":
    raise SystemExit(main())
