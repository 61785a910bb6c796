"""What the benchmarks of training speed share: shapes, rows, our side, the clock and the medians.

Full training keeps weights in float32, LoRA a frozen base in bf16, QLoRA one in 4 bits (nf4, double
quantisation), alike on all sides.
"""

from __future__ import annotations

import json
import os
import platform
import random
import resource
import statistics
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
METHODS = ("full", "lora", "qlora")
LORA = dict(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")


class Clock:
    """Times steps and keeps what they report; the first ones, ``warm``, are left out."""

    def __init__(self, warm: int, timed: int) -> None:
        self.warm, self.total = warm, warm + timed
        self._steps: list[tuple[float, int, float]] = []

    def step(self, tokens: int, loss: float) -> None:
        """Say that a step has ended: its tokens, and its loss."""
        self._steps.append((time.perf_counter(), tokens, loss))

    def peak_mib(self) -> float:
        """The most memory that this process has held."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def facts(self) -> dict[str, float]:
        """Tokens a second, memory and the mean loss."""
        start = self._steps[self.warm - 1][0]
        timed = self._steps[self.warm :]
        return {
            "tokens_per_second": sum(tokens for _, tokens, _ in timed) / (timed[-1][0] - start),
            "peak_mib": self.peak_mib(),
            "loss": statistics.fmean(loss for _, _, loss in timed),
        }


@dataclass(frozen=True)
class Shape:
    """A model, the length of packed rows, how many make a step, and steps: not timed, timed."""

    config: dict[str, Any]
    max_length: int
    packs_a_step: int
    warm_steps: int = 4
    steps: int = 16

    def clock(self) -> Clock:
        """One for a run with this shape."""
        return Clock(self.warm_steps, self.steps)


SHAPES = {
    "llama_34m": Shape(
        dict(model_type="llama", vocab_size=8192, hidden_size=512, intermediate_size=1376)
        | dict(num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8),
        max_length=1024,
        packs_a_step=2,
    ),
    "qwen_151k": Shape(
        dict(model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864)
        | dict(num_hidden_layers=2, num_attention_heads=14, num_key_value_heads=2)
        | dict(tie_word_embeddings=True),
        max_length=4096,
        packs_a_step=1,
        warm_steps=2,
        steps=6,
    ),
}


def prepare(folder: Path, shape: Shape) -> None:
    """Save the model, a word-level tokenizer with a chat template, and the rows."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = 4000
    names = ["<pad>", "</s>", "<user>", "<bot>", *(f"w{n}" for n in range(words))]
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
    settings = dict(shape.config) | dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    draw = random.Random(0)

    def text(mean: int) -> str:
        size = max(4, int(draw.lognormvariate(0, 0.7) * mean))
        return " ".join(f"w{draw.randrange(words)}" for _ in range(size))

    tokens = (shape.warm_steps + shape.steps + 1) * shape.packs_a_step * shape.max_length
    rows = []
    while tokens > 0:
        row = {"prompt": text(60), "completion": text(120)}
        tokens -= len(row["prompt"].split()) + len(row["completion"].split())
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows), "utf-8")


def messages(folder: Path) -> Any:
    """The rows as a dataset of prompts and completions."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
            }
            for row in json.loads((folder / "rows.json").read_text("utf-8"))
        ]
    )


def packs(folder: Path, shape: Shape) -> Any:
    """The rows tokenised by the tokenizer's own template and packed by us."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    from xtuner.dataset import process_hf_dataset
    from xtuner.dataset.map_fns import template_map_fn_factory
    from xtuner.utils import PROMPT_TEMPLATE

    talks = [{"messages": row["prompt"] + row["completion"]} for row in messages(folder)]
    return process_hf_dataset(
        Dataset.from_list(talks),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder),
        max_length=shape.max_length,
        template_map_fn=template_map_fn_factory(PROMPT_TEMPLATE.auto),
        pack_to_max_length=True,
        use_varlen_attn=True,
    )


def loading(method: str) -> dict[str, Any]:
    """The arguments of ``from_pretrained``, on all sides."""
    if method == "full":
        return {"dtype": "float32"}
    if method == "lora":
        return {"dtype": "bfloat16"}
    from transformers import BitsAndBytesConfig

    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )
    return {"dtype": "bfloat16", "quantization_config": bits}


def adapter(method: str) -> Any:
    """The ``LoraConfig`` of all sides; None for full training."""
    from peft import LoraConfig

    return None if method == "full" else LoraConfig(task_type="CAUSAL_LM", **LORA)


def run_ours(
    folder: Path,
    model: dict[str, Any],
    rows: Any,
    batch_size: int,
    clock: Clock,
    device: str = "cpu",
) -> Clock:
    """Train as ``xtuner train`` does.

    Args:
        folder: for the runner's own files.
        model: arguments of ``SupervisedFinetune``.
        rows: packed rows.
        batch_size: how many of them make a step.
        clock: is told of each step.
        device: ``cpu`` or ``cuda``.
    """
    import torch
    from mmengine.dataset import DefaultSampler
    from mmengine.hooks import Hook

    from xtuner.dataset.collate_fns import default_collate_fn
    from xtuner.engine.optim import FinetuneOptimWrapper
    from xtuner.engine.runner import FinetuneRunner, TrainLoop
    from xtuner.model import SupervisedFinetune

    class Timer(Hook):
        def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
            outputs = kwargs.get("outputs")
            if outputs:
                clock.step(int(outputs["tokens"]), float(outputs["loss"]))

    def collate(rows: Any) -> dict[str, Any]:
        return default_collate_fn(rows, use_varlen_attn=True)

    runner = FinetuneRunner(
        model=SupervisedFinetune(use_varlen_attn=True, **model),
        work_dir=str(folder / "ours"),
        train_dataloader=dict(
            batch_size=batch_size,
            num_workers=0,
            dataset=rows,
            sampler=dict(type=DefaultSampler, shuffle=False),
            collate_fn=collate,
        ),
        train_cfg=dict(type=TrainLoop, max_iters=clock.total),
        optim_wrapper=dict(
            type=FinetuneOptimWrapper,
            optimizer=dict(type=torch.optim.AdamW, lr=1e-4, weight_decay=0.0, fused=True),
            dtype="bfloat16",
            clip_grad=dict(max_norm=1.0),
            device=device,
        ),
        default_hooks=dict(checkpoint=None, logger=None, progress=None),
        custom_hooks=[Timer()],
        randomness=dict(seed=0),
    )
    runner.train()
    return clock


def matmul_rate(size: int = 2048, device: str = "cpu") -> float:
    """What this machine's bf16 matrix products reach, in TFLOP/s."""
    import torch

    one, other = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    best = 1e9
    for _ in range(20):
        begin = time.perf_counter()
        one @ other
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e12


def compared(sides: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The medians of each side's rounds, and ours in proportion to the others'."""
    failures = {
        side: run for side, runs in sides.items() for run in reversed(runs) if "failed" in run
    }
    medians: dict[str, Any] = {
        side: {key: middle([run[key] for run in runs]) for key in runs[0]}
        for side, runs in sides.items()
        if side not in failures
    }
    ratios = {
        f"{what}_of_{us}_to_{side}": medians[us][key] / medians[side][key]
        for us in medians
        if us.startswith("ours")
        for side in medians
        if not side.startswith("ours")
        for what, key in (("speed", "tokens_per_second"), ("memory", "peak_mib"))
    }
    return medians | failures | ratios


def middle(values: list[Any]) -> Any:
    """The median of numbers; the first of what is none."""
    return values[0] if isinstance(values[0], str) else statistics.median(values)


def circumstances() -> dict[str, Any]:
    """When, where and with what a method was measured."""
    return machine("torch", "transformers", "trl", "peft", "bitsandbytes") | {
        "bf16_matmul_tflops": matmul_rate(),
    }


def machine(*packages: str) -> dict[str, Any]:
    """The date, this machine, and the versions of some packages."""
    from importlib.metadata import version

    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {name: version(name) for name in packages},
    }
