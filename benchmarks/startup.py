"""From the command to the first optimizer step: ``xtuner train quickstart``, fresh and warm.

    python benchmarks/startup.py [CONFIG ...]

Fresh: no base model and no prepared data are there yet. Warm: both are. The time ends when the
first step stands in ``metrics.jsonl``. The bound is 10 s on two cores.
Writes ``results/startup.json``.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
import transformers

RESULT = Path(__file__).parent / "results" / "startup.json"
CONFIGS = ("quickstart", "quickstart_lora", "quickstart_qlora")
REPEATS = 5
BOUND = 10.0


def seconds_to_first_step(config: str, folder: Path, name: str) -> float:
    """Start the command in ``folder`` and stop it as soon as it has taken a step."""
    words = [sys.executable, "-m", "xtuner", "train", config, "--work-dir", name]
    environment = os.environ | {"XTUNER_CACHE": str(folder / "cache")}
    metrics = folder / name / "metrics.jsonl"
    begin = time.perf_counter()
    with (folder / f"{name}.log").open("w") as log:
        run = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    while not (metrics.is_file() and metrics.stat().st_size):
        if run.poll() is not None:
            raise SystemExit((folder / f"{name}.log").read_text())
        time.sleep(0.01)
    taken = time.perf_counter() - begin
    run.kill()
    run.wait()
    return taken


def measure(config: str) -> dict[str, float]:
    """The first start in an empty folder, and the median of those after it."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = seconds_to_first_step(config, Path(folder), "fresh")
        warm = [seconds_to_first_step(config, Path(folder), f"warm_{n}") for n in range(REPEATS)]
    return {"fresh": round(fresh, 2), "warm": round(statistics.median(warm), 2)}


def main(configs: Sequence[str]) -> int:
    """Measure, print, write; fail above the bound."""
    runs = {}
    for config in configs or CONFIGS:
        runs[config] = measure(config)
        print(
            f"{config:<20} fresh {runs[config]['fresh']:.1f} s  warm {runs[config]['warm']:.1f} s"
        )
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, {platform.python_version()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "bound": BOUND,
        "seconds": runs,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if max(each["fresh"] for each in runs.values()) < BOUND else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
