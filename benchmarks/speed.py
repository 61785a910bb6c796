"""Fine-tuning beside TRL's SFTTrainer and a plain Transformers loop: tokens/s and peak memory.

All train the same model in bf16 autocast on the same rows, each in a process of its own; the rounds
take turns. Tokens are those of the rows, padding does not count.

* ours: packed rows, samples kept apart; the runner of ``xtuner train`` with its optimizer.
* ours_compiled: the same with ``compile=True``; compiling falls into the steps that are left out.
* trl: SFTTrainer, packing on, loss on completions; trl_compiled with ``torch_compile=True``.
* plain: a loop over padded batches: model(**batch), backward, clip, AdamW.step.
* with --peers, XTuner 0.1.23 and LLaMA-Factory: see ``peers.py``.

Full training keeps weights in float32, LoRA a frozen base in bf16, QLoRA one in 4 bits (nf4, double
quantisation), alike on all sides; TRL keeps QLoRA's adapter in bf16, the others in float32.

    python benchmarks/speed.py [--shape llama_34m|qwen_151k] [--methods full lora qlora]
                               [--peers xtuner-0.1.23 llama-factory]

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
from functools import partial
from pathlib import Path
from typing import Any

import peers
from measuring import (
    METHODS,
    RESULTS,
    SHAPES,
    Shape,
    adapter,
    circumstances,
    compared,
    loading,
    messages,
    packs,
    prepare,
    run_ours,
)

ROUNDS = 3


def ours(folder: Path, shape: Shape, method: str, compiled: bool = False) -> dict[str, float]:
    """Through XTuner's runner."""
    from transformers import AutoModelForCausalLM

    llm = dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=str(folder),
        **loading(method),
    )
    model = dict(
        llm=llm, lora=adapter(method), compile=compiled, use_activation_checkpointing=False
    )
    # the packs of a step are joined into one row
    return run_ours(folder, model, packs(folder, shape), shape.packs_a_step, shape.clock()).facts()


def trl(folder: Path, shape: Shape, method: str, compiled: bool = False) -> dict[str, float]:
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
            folder, attn_implementation="sdpa", **loading(method)
        ),
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=shape.packs_a_step,
            max_steps=clock.total,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
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
        peft_config=adapter(method),
        callbacks=[Timer()],
    )
    trainer.train()
    return clock.facts()


def plain(folder: Path, shape: Shape, method: str) -> dict[str, float]:
    """A loop as in a tutorial: padded batches of about the same number of tokens."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, **loading(method))
    if method != "full":
        model = get_peft_model(model, adapter(method))
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
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(int(mask.sum()), loss.item())
    return clock.facts()


SIDES: dict[str, Callable[[Path, Shape, str], dict[str, float]]] = {
    "ours": ours,
    "ours_compiled": partial(ours, compiled=True),
    "trl": trl,
    "trl_compiled": partial(trl, compiled=True),
    "plain": plain,
}


def run_side(name: str, folder: Path, shape: str, method: str) -> dict[str, float]:
    """Run one side in a process of its own."""
    words = [sys.executable, __file__, "--shape", shape, "--side", name]
    words += ["--folder", str(folder), "--methods", method]
    environment = os.environ | {"XTUNER_CACHE": f"{folder}/cache"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Run the sides in turns and say how they compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama_34m")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--peers", nargs="*", choices=peers.PEERS, default=[])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    if args.side:
        print("\n" + json.dumps(SIDES[args.side](args.folder, shape, args.methods[0])))
        return 0
    sides = [*args.sides, *args.peers]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {
        method: {side: [] for side in sides} for method in args.methods
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, shape)
        for _ in range(args.rounds):
            for method, side in itertools.product(args.methods, sides):
                if side in args.peers:
                    run = peers.run(side, folder, shape, method)
                else:
                    run = run_side(side, folder, args.shape, method)
                found[method][side].append(run)
                print(method, side, run, flush=True)
    file = RESULTS / f"speed_{args.shape}.json"
    result: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    for method, runs in found.items():
        result[method] = circumstances() | compared(runs)
    file.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps({method: result[method] for method in found}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
