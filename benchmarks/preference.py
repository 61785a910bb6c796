"""DPO beside TRL's DPOTrainer: tokens per second and peak memory of full training on a CPU.

Both train the same Llama (34M parameters, 8k vocabulary) in bf16 autocast on the same pairs, in the
same order, with the reference precomputed, each in a process of its own; the rounds of the two
take turns. Prints medians and ratios, and writes ``results/preference.json``.

    python benchmarks/preference.py            # needs trl
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "preference.json"
PAIRS, PAIRS_A_STEP, WARM_STEPS, VOCABULARY = 96, 8, 2, 8192
ROUNDS = 3


def make_rows() -> list[dict[str, str]]:
    """Pairs whose lengths spread as those of chats do: many short, a few long."""
    draw = random.Random(0)
    words = [f"w{n}" for n in range(4000)]

    def text(mean: int) -> str:
        return " ".join(draw.choices(words, k=max(4, int(draw.lognormvariate(0, 0.8) * mean))))

    return [{"prompt": text(60), "chosen": text(90), "rejected": text(90)} for _ in range(PAIRS)]


def make_base(folder: Path) -> None:
    """Save the model and a word-level tokenizer with a chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<pad>", "</s>", "<user>", "<bot>", *(f"w{n}" for n in range(VOCABULARY - 4))]
    inner = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, "<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<pad>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }}"
        " </s> {% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def ours(folder: Path) -> dict[str, float]:
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

    clock = Clock()
    dataset = build_preference_dataset(
        Dataset.from_list(json.loads((folder / "rows.json").read_text("utf-8"))),
        AutoTokenizer.from_pretrained(folder),
        max_length=1024,
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
            dtype="bfloat16",
            clip_grad=dict(max_norm=1.0),
        ),
        default_hooks=dict(checkpoint=None, logger=None, progress=None),
        custom_hooks=[Timer()],
        randomness=dict(seed=0),
    )
    runner.train()
    return clock.facts()


def trl(folder: Path) -> dict[str, float]:
    """Through TRL's DPOTrainer with its reference precomputed as well."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    clock = Clock()
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
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
            max_length=1024,
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


class Clock:
    """Times steps and keeps what they report; the first ones are left out."""

    def __init__(self) -> None:
        self._steps: list[tuple[float, int, float]] = []

    def step(self, tokens: int, loss: float) -> None:
        self._steps.append((time.perf_counter(), tokens, loss))

    def facts(self) -> dict[str, float]:
        start = self._steps[WARM_STEPS - 1][0]
        timed = self._steps[WARM_STEPS:]
        losses = [loss for _, _, loss in self._steps]
        return {
            "tokens_per_second": sum(tokens for _, tokens, _ in timed) / (timed[-1][0] - start),
            "tokens": float(sum(tokens for _, tokens, _ in self._steps)),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "loss": statistics.fmean(losses),
            "last_loss": losses[-1],
        }


def _hook() -> Any:
    from mmengine.hooks import Hook

    return Hook


def _attention() -> str:
    from xtuner.model.modules import attention

    return attention.register()


def main() -> int:
    """Run both sides in turns and say how they compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=("ours", "trl"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    if args.side:
        print("\n" + json.dumps({"ours": ours, "trl": trl}[args.side](args.folder)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base(folder)
        (folder / "rows.json").write_text(json.dumps(make_rows()), "utf-8")
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
        for _ in range(args.rounds):
            for side, found in runs.items():
                words = [sys.executable, __file__, "--side", side, "--folder", name]
                printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
                found.append(json.loads(printed.splitlines()[-1]))
                print(side, found[-1], flush=True)
    medians = {
        side: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for side, found in runs.items()
    }
    us, them = medians["ours"], medians["trl"]
    result = {
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "versions": _versions(),
        "medians": medians,
        "speed_ratio": us["tokens_per_second"] / them["tokens_per_second"],
        "memory_ratio": us["peak_mib"] / them["peak_mib"],
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result, indent=1))
    return 0


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "trl", "peft")}


if __name__ == "__main__":
    raise SystemExit(main())
