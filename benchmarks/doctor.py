"""The data doctor on many rows: CPU seconds and memory of ``xtuner check-custom-dataset``.

Alpaca-like rows of made-up words as messages (``data.py``), a byte-level tokenizer, packing; the
whole command in a new process with empty caches: rows scanned, rows encoded, packs written. CPU
seconds (of all processes) depend less on what else the machine does than the time on the clock.
Writes ``results/doctor.json``.

    python benchmarks/doctor.py [--rows 1000000] [--all-rows]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import psutil
from data import make_rows, make_tokenizer, to_messages

RESULT = Path(__file__).parent / "results" / "doctor.json"
CONFIG = """
from datasets import load_dataset
from transformers import AutoTokenizer
from xtuner.dataset import process_hf_dataset
from xtuner.dataset.map_fns import openai_map_fn, template_map_fn_factory
from xtuner.utils import PROMPT_TEMPLATE

train_dataloader = dict(
    batch_size=1,
    dataset=dict(
        type=process_hf_dataset,
        dataset=dict(type=load_dataset, path="json", data_files="messages.jsonl"),
        tokenizer=dict(
            type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path="tokenizer"
        ),
        max_length=2048,
        dataset_map_fn=openai_map_fn,
        template_map_fn=dict(type=template_map_fn_factory, template=PROMPT_TEMPLATE.qwen_chat),
        remove_unused_columns=True,
        pack_to_max_length=True,
    ),
)
"""


def measure(folder: Path, *options: str) -> dict[str, float]:
    """Seconds, CPU seconds and the most memory of the largest process, of one run."""
    environment = os.environ | {"XTUNER_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(folder / "datasets")}
    words = [
        sys.executable,
        "-m",
        "xtuner",
        "check-custom-dataset",
        "config.py",
        "--json",
        *options,
    ]
    begin = time.perf_counter()
    run = psutil.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    peak, used = 0, 0.0
    while run.poll() is None:
        try:
            times = run.cpu_times()
            used = max(used, sum(times[:4]))
            processes = [run, *run.children(recursive=True)]
            peak = max(peak, *(each.memory_info().rss for each in processes))
        except psutil.Error:
            continue
        time.sleep(0.1)
    if run.returncode:
        raise SystemExit(f"check-custom-dataset ended with {run.returncode}")
    return {
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(used, 1),
        "largest_process_mib": round(peak / 2**20),
    }


def main() -> int:
    """Measure; write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--all-rows", action="store_true", help="encode all rows, not a sample")
    args = parser.parse_args()
    options = ["--all-rows"] if args.all_rows else []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_rows(folder, args.rows)
        make_tokenizer(folder, "byte_level", 8192)
        rows, messages = folder / "rows.jsonl", folder / "messages.jsonl"
        with rows.open(encoding="utf-8") as source, messages.open("w", encoding="utf-8") as target:
            for line in source:
                target.write(json.dumps({"messages": to_messages(json.loads(line))}) + "\n")
        (folder / "config.py").write_text(CONFIG, "utf-8")
        found = measure(folder, *options)
    result = {
        "date": date.today().isoformat(),
        "command": " ".join(["python benchmarks/doctor.py --rows", str(args.rows), *options]),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, {platform.python_version()}",
        "rows": args.rows,
        **found,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
