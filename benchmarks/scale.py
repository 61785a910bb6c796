"""Each way to spread a model over processes: tokens/s and peak memory of a process, for 1 and 2.

    python benchmarks/scale.py [--ways ddp fsdp zero2 ...] [--steps 6]    # needs deepspeed

A 34M Llama in bf16 (float32 weights and AdamW under DDP and FSDP; bf16 weights with float32 copies
under DeepSpeed) on rows of 1,024 random tokens, two a step in all, through ``xtuner train``; each
process has one thread. Peak memory is that of a rank's private pages (USS). The ways take turns,
medians are quoted. Writes ``results/scale.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.data import Dataset

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "scale.json"
LENGTH = 1024
ROWS_A_STEP = 2
WARM_STEPS = 2
ROUNDS = 2
WAYS: dict[str, list[str]] = {
    "ddp": [],
    "fsdp": ["--fsdp"],
    "zero1": ["--deepspeed", "deepspeed_zero1"],
    "zero2": ["--deepspeed", "deepspeed_zero2"],
    "zero3": ["--deepspeed", "deepspeed_zero3"],
    "sequence": [],
}
CONFIG = """
from mmengine.dataset import DefaultSampler
from mmengine.hooks import LoggerHook
from mmengine.optim import AmpOptimWrapper
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from benchmarks.scale import Rows
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.engine.runner import TrainLoop
from xtuner.model import SupervisedFinetune

accumulative_counts = 1
sequence_parallel_size = 1
steps = 6
model = dict(
    type=SupervisedFinetune,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=BASE),
    use_activation_checkpointing=False,
)
train_dataloader = dict(
    batch_size=1,
    num_workers=0,
    dataset=dict(type=Rows, count=64),
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=default_collate_fn),
)
optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=AdamW, lr=1e-4),
    clip_grad=dict(max_norm=1),
    accumulative_counts=accumulative_counts,
    dtype="bfloat16",
)
param_scheduler = []
train_cfg = dict(type=TrainLoop, max_iters=accumulative_counts * steps)
default_hooks = dict(
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=1), checkpoint=None
)
env_cfg = dict(dist_cfg=dict(backend="gloo"))
randomness = dict(seed=0)
log_processor = dict(by_epoch=False)
"""


class Rows(Dataset):
    """Rows of random tokens that are all trained."""

    def __init__(self, count: int) -> None:
        self.ids = torch.randint(0, 8192, (count, LENGTH), generator=torch.Generator())

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Any]:
        ids = self.ids[row].tolist()
        return {"input_ids": ids, "labels": ids}


def measure(folder: Path, way: str, processes: int, steps: int) -> dict[str, float]:
    """Tokens/s (median over steps) and the largest USS of a rank in MB, of one run."""
    out = folder / f"{way}_{processes}_{time.time_ns()}"
    shared = processes if way == "sequence" else 1
    options = [f"steps={steps}", f"sequence_parallel_size={shared}"]
    options.append(f"accumulative_counts={ROWS_A_STEP * shared // processes}")
    words = [sys.executable, "-m", "xtuner", "train", str(folder / "config.py"), "--work-dir"]
    words += [str(out), *WAYS[way], "--cfg-options", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["NPROC_PER_NODE"] = str(processes)
    with (folder / "log").open("w") as log:
        run = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
        peak = 0
        while run.poll() is None:
            peak = max(peak, largest_rank(run.pid, processes))
            time.sleep(0.1)
    if run.returncode:
        raise SystemExit((folder / "log").read_text())
    lines = (out / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines][WARM_STEPS:]
    speeds = [entry["tokens"] / entry["step_time"] for entry in entries]
    return {"tokens_per_s": statistics.median(speeds), "megabytes": peak / 2**20}


def largest_rank(pid: int, processes: int) -> int:
    """Bytes that the largest rank has for itself."""
    try:
        tree = psutil.Process(pid)
        ranks = tree.children(recursive=True) if processes > 1 else [tree]
        return max((rank.memory_full_info().uss for rank in ranks), default=0)
    except psutil.Error:
        return 0


def save_model(folder: Path) -> None:
    """A 34M Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=LENGTH,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "base")
        (folder / "config.py").write_text(CONFIG.replace("BASE", repr(str(folder / "base"))))
        for _ in range(ROUNDS):
            for way in args.ways:
                for processes in (1, 2) if way != "sequence" else (2,):
                    got = measure(folder, way, processes, args.steps)
                    found.setdefault(f"{way}, {processes}", []).append(got)
                    print(f"{way:<9} {processes}  {got}", flush=True)
    runs = {
        key: {name: round(statistics.median(r[name] for r in each)) for name in each[0]}
        for key, each in found.items()
    }
    one = runs.get("ddp, 1")
    for key, run in runs.items():
        share = f"{run['tokens_per_s'] / one['tokens_per_s']:.2f}x" if one else ""
        print(f"{key:<12} {run['tokens_per_s']:>6,} tokens/s {share:>6} {run['megabytes']:>6,} MB")
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, {platform.python_version()}",
        "versions": {"torch": torch.__version__},
        "rows_of_a_step": ROWS_A_STEP,
        "length": LENGTH,
        "runs": runs,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
