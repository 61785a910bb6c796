"""DPO beside TRL's DPOTrainer: tokens per second and peak memory of full training on a CPU.

Both train the same model on the same pairs, in the same order, with the reference precomputed, each
in a process of its own; the rounds of the two take turns. Products are in bf16 where the processor
has it, otherwise in float32. The shape is one of ``measuring.py``: a Llama of 34M parameters with
made-up words, or a published model with real text. Prints medians and ratios, and writes
``results/preference.json`` or ``results/preference_<shape>.json``.

    python benchmarks/preference.py [--shape smollm2_135m] [--pairs 16] [--rounds 3]  # needs trl
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import (
    RESULTS,
    SHAPES,
    Clock,
    machine,
    matmul_rate_of_cpu,
    mixed_dtype,
    prepare,
    spread,
)

PAIRS, PAIRS_A_STEP, WARM_STEPS, SMALL = 96, 8, 1, "llama_34m"
MAX_LENGTH = 1024
ROUNDS = 3


def real_rows(folder: Path, pairs: int) -> list[dict[str, str]]:
    """Pairs of the text that ``prepare`` has written: the answer, and that to another question."""
    rows = json.loads((folder / "rows.json").read_text("utf-8"))
    others = [*rows[1:], rows[0]]
    found = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
        for row, other in zip(rows, others, strict=True)
    ]
    return found[:pairs]


def made_up_rows(pairs: int) -> list[dict[str, str]]:
    """Pairs whose lengths spread as those of chats do: many short, a few long."""
    draw = random.Random(0)
    words = [f"w{n}" for n in range(4000)]

    def text(mean: int) -> str:
        return " ".join(draw.choices(words, k=max(4, int(draw.lognormvariate(0, 0.8) * mean))))

    return [{"prompt": text(60), "chosen": text(90), "rejected": text(90)} for _ in range(pairs)]


def write(folder: Path, name: str, pairs: int) -> None:
    """The model, its tokenizer and the pairs."""
    shape = SHAPES[name]
    # tokens enough for every pair to have a question and an answer of its own
    prepare(folder, replace(shape, warm_steps=0, steps=pairs, packs_a_step=1, max_length=512))
    rows = real_rows(folder, pairs) if shape.real_text else made_up_rows(pairs)
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")


def ours(folder: Path, dtype: str, clock: Clock) -> dict[str, float]:
    """Through XTuner's runner: packed rows, the chunked log-probabilities."""
    import torch
    from datasets import Dataset
    from mmengine.dataset import DefaultSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from xtuner.dataset.collate_fns import preference_collate_fn
    from xtuner.dataset.preference_dataset import build_preference_dataset
    from xtuner.engine.optim import FinetuneOptimWrapper
    from xtuner.engine.runner import FinetuneRunner, TrainLoop
    from xtuner.model.dpo import DPO

    dataset = build_preference_dataset(
        Dataset.from_list(json.loads((folder / "rows.json").read_text("utf-8"))),
        AutoTokenizer.from_pretrained(folder),
        max_length=MAX_LENGTH,
    )

    def collate(rows: Any) -> dict[str, Any]:
        return preference_collate_fn(rows, use_varlen_attn=True)

    class Timer(_hook()):  # type: ignore[misc]
        def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
            outputs = kwargs.get("outputs")
            clock.step(int(outputs["tokens"]), float(outputs["loss"]))

    llm = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=_attention())
    runner = FinetuneRunner(
        model=DPO(
            llm,
            precompute_reference=True,
            use_varlen_attn=True,
            use_activation_checkpointing=False,
        ),
        work_dir=str(folder / "ours"),
        train_dataloader=dict(
            batch_size=PAIRS_A_STEP,
            num_workers=0,
            dataset=dataset,
            sampler=dict(type=DefaultSampler, shuffle=False),
            collate_fn=collate,
        ),
        train_cfg=dict(type=TrainLoop, max_epochs=1),
        optim_wrapper=dict(
            type=FinetuneOptimWrapper,
            optimizer=dict(type=torch.optim.AdamW, lr=1e-5, weight_decay=0.0),
            dtype=dtype,
            clip_grad=dict(max_norm=1.0),
        ),
        default_hooks=dict(checkpoint=None, logger=None, progress=None),
        custom_hooks=[Timer()],
        randomness=dict(seed=0),
    )
    runner.train()
    return clock.facts()


def trl(folder: Path, dtype: str, clock: Clock) -> dict[str, float]:
    """Through TRL's DPOTrainer with its reference precomputed as well."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{
                side: [{"role": "assistant", "content": row[side]}]
                for side in ("chosen", "rejected")
            },
        }
        for row in json.loads((folder / "rows.json").read_text("utf-8"))
    ]

    class InOrder(DPOTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            from torch.utils.data import SequentialSampler

            return SequentialSampler(self.train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.tokens = int(
                sum(v.sum() for k, v in inputs.items() if k.endswith("_mask") and "attention" in k)
            )
            found = super().compute_loss(model, inputs, *args, **kwargs)
            self.last = float(found[0] if isinstance(found, tuple) else found)
            return found

    class Timer(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.step(trainer.tokens, trainer.last)

    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa"),
        args=DPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=PAIRS_A_STEP,
            num_train_epochs=1,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            bf16=dtype == "bfloat16",
            use_cpu=True,
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
            max_length=MAX_LENGTH,
            save_strategy="no",
            report_to=[],
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Timer()],
    )
    trainer.train()
    return clock.facts()


def _hook() -> Any:
    from mmengine.hooks import Hook

    return Hook


def _attention() -> str:
    from xtuner.model.modules import attention

    return attention.register()


def take_turns(folder: Path, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """What each round of both sides found."""
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    rate = matmul_rate_of_cpu(dtype=args.dtype)
    for _ in range(args.rounds):
        for side, found in runs.items():
            words = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
            words += ["--pairs", str(args.pairs), "--dtype", args.dtype]
            printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
            before, rate = rate, matmul_rate_of_cpu(dtype=args.dtype)
            rates = {"matmul_tflops_before": before, "matmul_tflops_after": rate}
            found.append(json.loads(printed.splitlines()[-1]) | rates)
            print(side, found[-1], flush=True)
    return runs


SIDES = {"ours": ours, "trl": trl}


def main() -> int:
    """Run both sides in turns and say how they compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default=SMALL)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=mixed_dtype())
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        clock = Clock(WARM_STEPS, args.pairs // PAIRS_A_STEP - WARM_STEPS)
        print("\n" + json.dumps(SIDES[args.side](args.folder, args.dtype, clock)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), args.shape, args.pairs)
        runs = take_turns(Path(name), args)
    medians = {
        side: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for side, found in runs.items()
    }
    spreads = {
        side: spread([run["tokens_per_second"] for run in found]) for side, found in runs.items()
    }
    us, them = medians["ours"], medians["trl"]
    result = machine("torch", "transformers", "trl", "peft") | {
        "dtype": args.dtype,
        "pairs": args.pairs,
        "rounds": args.rounds,
        "medians": medians,
        "lowest_and_highest": spreads,
        "speed_ratio": us["tokens_per_second"] / them["tokens_per_second"],
        "speed_ratio_in_cpu_seconds": us["tokens_per_cpu_second"] / them["tokens_per_cpu_second"],
        "memory_ratio": us["peak_mib"] / them["peak_mib"],
    }
    file = "preference.json" if args.shape == SMALL else f"preference_{args.shape}.json"
    (RESULTS / file).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
