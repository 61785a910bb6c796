"""Fine-tuning beside TRL's SFTTrainer and a plain Transformers loop: tokens/s and peak memory.

All train the same model on the same rows with the same settings, each in a process of its own; the
rounds take turns. Tokens are those of the rows, padding does not count.

* ours: packed rows, samples kept apart; the runner of ``xtuner train`` with its optimizer.
* ours_compiled: the same with ``compile=True``; compiling falls into the steps that are left out.
* trl: SFTTrainer, packing on, loss on completions; trl_compiled with ``torch_compile=True``.
* plain: a loop over padded batches: model(**batch), backward, clip, AdamW.step.
* with --peers, XTuner 0.1.23 and LLaMA-Factory: see ``peers.py``.

Everything runs in bf16 autocast where the processor has bf16, otherwise in float32. Full training
keeps weights in float32, LoRA a frozen base in the dtype of the products, QLoRA one in 4 bits (nf4,
double quantisation), alike on all sides; TRL keeps QLoRA's adapter in that dtype, the others in
float32. Recipes: ``bare`` is LoRA of rank 16 without dropout, without activation checkpointing;
``catalogue`` has what the configs have, rank 64, dropout 0.1, activation checkpointing.

The rate of the machine's matrix products is measured before and after each side. ``share`` is what
a side makes of it: the operations that its tokens need (``measuring.operations``) in its time. Both
are of seconds of the processor, which depend less on what else the machine does.

    python benchmarks/speed.py [--shape qwen2_5_0_5b] [--methods full lora qlora]
                               [--recipes bare catalogue] [--sides ours trl] [--rounds 3]
                               [--peers xtuner-0.1.23 llama-factory] [--max-length 1024]

Needs trl.

Writes ``results/speed_<shape>.json``, where methods that were not run keep their figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peers
from measuring import (
    METHODS,
    RECIPES,
    RESULTS,
    SHAPES,
    Case,
    Shape,
    adapter,
    circumstances,
    compared,
    loading,
    matmul_rate_of_cpu,
    messages,
    mixed_dtype,
    operations,
    packs,
    prepare,
    run_ours,
)

ROUNDS = 3


def ours(folder: Path, shape: Shape, case: Case, compiled: bool = False) -> dict[str, float]:
    """Through XTuner's runner."""
    from transformers import AutoModelForCausalLM

    llm = dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=str(folder),
        **loading(case.method, case.dtype),
    )
    model = dict(
        llm=llm,
        lora=adapter(case.method, case.settings),
        compile=compiled,
        use_activation_checkpointing=case.settings.checkpointing,
    )
    rows = packs(folder, shape)
    # the packs of a step are joined into one row
    done = run_ours(folder, model, rows, shape.packs_a_step, shape.clock(), dtype=case.dtype)
    return done.facts()


def trl(folder: Path, shape: Shape, case: Case, compiled: bool = False) -> dict[str, float]:
    """Through TRL's SFTTrainer."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    clock, seen = shape.clock(), {"tokens": 0, "losses": []}

    class Counting(SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            ids = inputs["input_ids"]
            seen["tokens"] += int(mask.sum()) if mask is not None else ids.numel()
            found = super().compute_loss(model, inputs, *args, **kwargs)
            seen["losses"].append(float(found[0] if isinstance(found, tuple) else found))
            return found

    class Timer(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.step(seen["tokens"], statistics.fmean(seen["losses"]))
            seen["tokens"], seen["losses"] = 0, []

    trainer = Counting(
        model=AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", **loading(case.method, case.dtype)
        ),
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=shape.packs_a_step,
            max_steps=clock.total,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=case.mixed,
            use_cpu=True,
            gradient_checkpointing=case.settings.checkpointing,
            packing=True,
            completion_only_loss=True,
            max_length=shape.max_length,
            save_strategy="no",
            report_to=[],
            logging_strategy="no",
            disable_tqdm=True,
            torch_compile=compiled,
        ),
        train_dataset=messages(folder),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        peft_config=adapter(case.method, case.settings),
        callbacks=[Timer()],
    )
    trainer.train()
    return clock.facts()


def plain(folder: Path, shape: Shape, case: Case) -> dict[str, float]:
    """A loop as in a tutorial: padded batches of about the same number of tokens."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    options = loading(case.method, case.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    if case.settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if case.method != "full":
        model = get_peft_model(model, adapter(case.method, case.settings))
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    samples = []
    for pack in packs(folder, shape):
        boundaries = pack["cumulative_len"]
        for a, b in itertools.pairwise(boundaries):
            samples.append((pack["input_ids"][a:b], pack["labels"][a:b]))
    clock, model = shape.clock(), model.train()
    wanted = shape.packs_a_step * shape.max_length
    for _ in range(clock.total):
        batch = []
        while samples and sum(len(ids) for ids, _ in batch) < wanted:
            batch.append(samples.pop(0))
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
        labels = torch.tensor([each + [-100] * (longest - len(each)) for _, each in batch])
        mask = torch.tensor([[1] * len(x) + [0] * (longest - len(x)) for x, _ in batch])
        with torch.autocast("cpu", torch.bfloat16, enabled=case.mixed):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(int(mask.sum()), loss.item())
    return clock.facts()


SIDES: dict[str, Callable[[Path, Shape, Case], dict[str, float]]] = {
    "ours": ours,
    "ours_compiled": partial(ours, compiled=True),
    "trl": trl,
    "trl_compiled": partial(trl, compiled=True),
    "plain": plain,
}


def run_side(name: str, folder: Path, shape: str, max_length: int, case: Case) -> dict[str, Any]:
    """Run one side in a process of its own."""
    words = [sys.executable, __file__, "--shape", shape, "--side", name, "--folder", str(folder)]
    words += ["--max-length", str(max_length), "--dtype", case.dtype]
    words += ["--methods", case.method, "--recipes", case.recipe]
    environment = os.environ | {"XTUNER_CACHE": f"{folder}/cache"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"failed": (lines or [f"status {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def take_turns(
    args: argparse.Namespace, shape: Shape, cases: list[Case]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What each round of each side found, by case and side."""
    sides = [*args.sides, *args.peers]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {
        case.name: {side: [] for side in sides} for case in cases
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, shape)
        supervised = statistics.fmean(
            label >= 0 for row in packs(folder, shape) for label in row["labels"]
        )
        rate = matmul_rate_of_cpu(dtype=args.dtype)
        for _, case, side in itertools.product(range(args.rounds), cases, sides):
            if side in args.peers:
                run = peers.run(side, folder, shape, case)
            else:
                run = run_side(side, folder, args.shape, shape.max_length, case)
            before, rate = rate, matmul_rate_of_cpu(dtype=args.dtype)
            if "failed" not in run:
                needed = operations(shape, case, supervised) * run["tokens_per_cpu_second"]
                rates = {"matmul_tflops_before": before, "matmul_tflops_after": rate}
                run |= rates | {"share": needed / 1e12 / statistics.fmean((before, rate))}
            found[case.name][side].append(run)
            print(case.name, side, run, flush=True)
    return found


def main() -> int:
    """Run the sides in turns and say how they compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama_34m")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["bare"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--peers", nargs="*", choices=peers.PEERS, default=[])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--max-length", type=int, help="of a packed row, if not the shape's")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=mixed_dtype())
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    shape = replace(shape, max_length=args.max_length or shape.max_length)
    cases = [Case(*each, args.dtype) for each in itertools.product(args.methods, args.recipes)]
    if args.side:
        print("\n" + json.dumps(SIDES[args.side](args.folder, shape, cases[0])))
        return 0
    import torch

    file = RESULTS / f"speed_{args.shape}.json"
    result: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    for name, runs in take_turns(args, shape, cases).items():
        facts = {"rounds": args.rounds, "dtype": args.dtype, "max_length": shape.max_length}
        facts["threads"] = torch.get_num_threads()
        result[name] = circumstances() | facts | compared(runs)
        print(name, json.dumps(result[name], indent=1))
    file.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
