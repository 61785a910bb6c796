"""Preparing rows for training: rows per second and peak memory, beside two others.

Rows per CPU second (of all processes together) depend less on what else the machine does.
Two kinds of rows: ``words``, alpaca-like rows of made-up words, and ``text``, conversations of real
text (``real_text.py``) with a byte-level tokenizer or a SentencePiece-like one.

* ours: ``process_hf_dataset``;
* per row: the same steps as plain ``datasets.map`` calls, a row at a time, as v0.1 had them, with
  two processes and with one;
* TRL: what ``SFTTrainer`` does to prompt-completion rows before it trains, with its packing.

All map, add the template, tokenise and pack the same rows into the same length with two processes,
each in a new process without a cache; the rounds take turns. Writes ``results/data.json``, or
``results/data_text.json``. What is not installed (TRL) is left out.

    python benchmarks/data.py [--kind words] [--rows 200000] [--rounds 3]
    python benchmarks/data.py --kind text [--rows 20000] [--tokenizer sentencepiece]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import real_text

RESULTS = {
    "words": Path(__file__).parent / "results" / "data.json",
    "text": Path(__file__).parent / "results" / "data_text.json",
}
ROWS = {"words": 200_000, "text": 20_000}
TOKENIZERS = ("byte_level", "sentencepiece")
VOCABULARIES = {"words": 8192, "text": 16_000}
MAX_LENGTH, PROCESSES = 2048, 2
PROMPT, END = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"


def make_rows(folder: Path, count: int) -> None:
    """Rows with lengths like alpaca's, of made-up words that come as often as words do (Zipf)."""
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(30000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]

    def text(mean: int) -> str:
        length = max(3, int(draw.lognormvariate(0, 0.6) * mean))
        return " ".join(draw.choices(words, cum_weights=summed, k=length)) + "."

    summed = [sum(weights[:0])]
    for weight in weights:
        summed.append(summed[-1] + weight)
    summed = summed[1:]
    with (folder / "rows.jsonl").open("w") as stream:
        for _ in range(count):
            row = {"instruction": text(12), "input": text(15) if draw.random() < 0.4 else ""}
            stream.write(json.dumps(row | {"output": text(45)}) + "\n")


def make_tokenizer(folder: Path, kind: str, size: int) -> None:
    """A BPE tokenizer, ``byte_level`` or ``sentencepiece``-like, trained on some of the rows."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "byte_level":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        inner.normalizer = normalizers.Sequence(marks)
        inner.decoder = decoders.Metaspace()
        alphabet = []
    with (folder / "rows.jsonl").open(encoding="utf-8") as stream:
        lines = [line for line, _ in zip(stream, range(5000), strict=False)]
    sample = [text for line in lines for text in _texts(line)]
    if kind != "byte_level":  # so that no token spans words
        sample = [word for text in sample for word in re.split("(?= )", text)]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    inner.train_from_iterator(sample, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder / "tokenizer")


def _texts(line: str) -> list[str]:
    row = json.loads(line)
    return [message["content"] for message in row.get("messages", [])] or [row["output"]]


def to_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """A row of either kind as messages."""
    if "messages" in row:
        return list(row["messages"])
    return [
        {"role": "user", "content": f"{row['instruction']}\n{row['input']}"},
        {"role": "assistant", "content": row["output"]},
    ]


def ours(rows: Any, tokenizer: Any) -> Any:
    """Through XTuner."""
    from xtuner.dataset import process_hf_dataset
    from xtuner.dataset.map_fns import alpaca_map_fn, openai_map_fn, template_map_fn_factory
    from xtuner.utils import PROMPT_TEMPLATE

    return process_hf_dataset(
        rows,
        tokenizer=tokenizer,
        max_length=MAX_LENGTH,
        dataset_map_fn=openai_map_fn if "messages" in rows.column_names else alpaca_map_fn,
        template_map_fn=template_map_fn_factory(PROMPT_TEMPLATE.qwen_chat),
        pack_to_max_length=True,
        use_varlen_attn=True,
        map_num_proc=PROCESSES,
    )


def per_row(rows: Any, tokenizer: Any, processes: int | None = PROCESSES) -> Any:
    """Plain maps: a row to a conversation, to text, to ids; those without a label out; packed."""

    def to_turns(row: dict[str, Any]) -> dict[str, Any]:
        contents = [message["content"] for message in to_messages(row)]
        pairs = zip(contents[::2], contents[1::2], strict=True)
        return {"conversation": [{"input": ask, "output": answer} for ask, answer in pairs]}

    def with_template(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "conversation": [
                {"input": PROMPT.format(turn["input"]), "output": turn["output"] + END}
                for turn in row["conversation"]
            ]
        }

    def to_ids(row: dict[str, Any]) -> dict[str, list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for turn in row["conversation"]:
            question = tokenizer.encode(turn["input"], add_special_tokens=False)
            answer = tokenizer.encode(turn["output"], add_special_tokens=False)
            ids += [tokenizer.bos_token_id, *question, *answer, tokenizer.eos_token_id]
            labels += [-100] * (1 + len(question)) + [*answer, tokenizer.eos_token_id]
        return {"input_ids": ids[:MAX_LENGTH], "labels": labels[:MAX_LENGTH]}

    def has_label(row: dict[str, list[int]]) -> bool:
        return any(label >= 0 for label in row["labels"])

    def joined(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        columns = {name: [token for row in value for token in row] for name, value in batch.items()}
        starts = range(0, len(columns["input_ids"]), MAX_LENGTH)
        return {
            name: [tokens[start : start + MAX_LENGTH] for start in starts]
            for name, tokens in columns.items()
        }

    rows = rows.map(to_turns, num_proc=processes, remove_columns=rows.column_names)
    rows = rows.map(with_template, num_proc=processes)
    rows = rows.map(to_ids, num_proc=processes, remove_columns=rows.column_names)
    rows = rows.filter(has_label, num_proc=processes)
    return (
        rows.shuffle(seed=0)
        .flatten_indices(num_proc=processes)
        .map(joined, batched=True, num_proc=processes)
    )


def per_row_one_process(rows: Any, tokenizer: Any) -> Any:
    """The same in one process, as ``datasets.map`` does it when it is not told otherwise."""
    return per_row(rows, tokenizer, None)


def trl(rows: Any, tokenizer: Any) -> Any:
    """Through TRL's trainer, which prepares its data when it is built."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    def to_prompt(row: dict[str, Any]) -> dict[str, Any]:
        messages = to_messages(row)
        return {"prompt": messages[:-1], "completion": messages[-1:]}

    rows = rows.map(to_prompt, num_proc=PROCESSES, remove_columns=rows.column_names)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=0,
    )
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_length=MAX_LENGTH,
        packing=True,
        dataset_num_proc=PROCESSES,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    with torch.no_grad():
        trainer = SFTTrainer(
            LlamaForCausalLM(config), arguments, train_dataset=rows, processing_class=tokenizer
        )
    return trainer.train_dataset


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "ours": ours,
    "per_row": per_row,
    "per_row_one_process": per_row_one_process,
    "trl": trl,
}


class PeakMemory(threading.Thread):
    """The most memory that this process and its children held, looked at 20 times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.largest_process = 0, 0

    def run(self) -> None:
        me = psutil.Process()
        while True:
            held = []
            for process in [me, *me.children(recursive=True)]:
                try:
                    held.append(process.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
            self.bytes = max(self.bytes, sum(held))
            self.largest_process = max(self.largest_process, *held)
            time.sleep(0.05)


def measure_here(way: str, folder: Path) -> dict[str, float]:
    """Prepare the rows once; called in a process of its own."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    loaded: Any = datasets.load_dataset(
        "json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder / "hf")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    peak = PeakMemory()
    peak.start()
    begin, used = time.perf_counter(), sum(os.times()[:4])
    made = WAYS[way](loaded, tokenizer)
    seconds, used = time.perf_counter() - begin, sum(os.times()[:4]) - used
    tokens = sum(len(row) for row in made["input_ids"])
    return {
        "rows_per_second": round(loaded.num_rows / seconds, 1),
        "rows_per_cpu_second": round(loaded.num_rows / used, 1),
        "peak_mib": round(peak.bytes / 2**20),
        "largest_process_mib": round(peak.largest_process / 2**20),
        "packed_rows": made.num_rows,
        "tokens": tokens,
    }


def measure(way: str, folder: Path) -> dict[str, float]:
    """The same in a new process with empty caches."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "XTUNER_CACHE": cache,
            "HF_DATASETS_CACHE": f"{cache}/hf",
            "TOKENIZERS_PARALLELISM": "false" if way != "ours" else "true",
        }
        # Maps of datasets that were loaded from a cache are kept beside it: a copy for each.
        copy = Path(cache) / "data"
        copy.mkdir()
        (copy / "rows.jsonl").symlink_to(folder / "rows.jsonl")
        (copy / "tokenizer").symlink_to(folder / "tokenizer")
        done = subprocess.run(
            [sys.executable, __file__, "--way", way, "--folder", str(copy)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Measure; write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=RESULTS, default="words")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", choices=TOKENIZERS, action="append")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure_here(args.way, args.folder)))
        return 0
    count = args.rows or ROWS[args.kind]
    kinds = args.tokenizer or (["byte_level"] if args.kind == "words" else list(TOKENIZERS))
    ways = [way for way in WAYS if way != "trl" or importlib.util.find_spec("trl")]
    cases = {kind: compare(args.kind, kind, ways, count, args.rounds) for kind in kinds}
    packages = ["datasets", "tokenizers", *(["trl"] if "trl" in ways else [])]
    result = {
        "date": date.today().isoformat(),
        "command": f"python benchmarks/data.py {' '.join(sys.argv[1:])}".strip(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        **(cases["byte_level"] if args.kind == "words" else cases),
    }
    RESULTS[args.kind].write_text(json.dumps(result, indent=1) + "\n")
    return 0


def compare(
    kind: str, tokenizer: str, ways: list[str], count: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Measure all ways in turns; print and return medians and ratios."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "text":
            real_text.write_rows(folder / "rows.jsonl", count)
        else:
            make_rows(folder, count)
        make_tokenizer(folder, tokenizer, VOCABULARIES[kind])
        for number in range(rounds):
            for way in ways:
                found[way].append(measure(way, folder))
                print(f"{tokenizer}, round {number + 1}, {way}: {found[way][-1]}", flush=True)
    medians = {
        way: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for way, runs in found.items()
    }
    ratios = {
        name: {
            way: round(medians["ours"][name] / medians[way][name], 2)
            for way in ways
            if way != "ours"
        }
        for name in ("rows_per_second", "rows_per_cpu_second")
    }
    for way, run in medians.items():
        print(f"{way:<20} {run['rows_per_second']:>9,.0f} rows/s  peak {run['peak_mib']:,.0f} MiB")
    for name, ratio in ratios.items():
        listed = ", ".join(f"{times}x ({way})" for way, times in ratio.items())
        print(f"ours is faster by {listed} in {name}")
    return {"medians": medians, "ours_is_faster_by": ratios}


if __name__ == "__main__":
    sys.exit(main())
