"""What the benchmarks of training speed share: shapes, rows, our side, the clock and the medians.

Full training keeps weights in float32, LoRA a frozen base in bf16, QLoRA one in 4 bits (nf4, double
quantisation), alike on all sides. A CPU without bf16 computes everything in float32.
"""

from __future__ import annotations

import json
import os
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
METHODS = ("full", "lora", "qlora")
RATIOS = {
    "speed": "tokens_per_second",
    "speed_in_cpu_seconds": "tokens_per_cpu_second",
    "memory": "peak_mib",
}
"""What results have of our side in proportion to others, and what it is the ratio of."""
SPECIAL = ("<pad>", "</s>", "<user>", "<bot>")
VOCABULARY = 32_000
"""Of the tokenizer of real text at most; the model's may be larger."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a run beside its method: ``LoraConfig``'s, and activation checkpointing."""

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    checkpointing: bool = False

    def lora(self) -> dict[str, Any]:
        """Those of ``LoraConfig``."""
        names = ("r", "lora_alpha", "lora_dropout")
        return {name: getattr(self, name) for name in names} | {"target_modules": "all-linear"}


RECIPES = {
    "bare": Recipe(),
    # of xtuner/configs/settings.py
    "catalogue": Recipe(r=64, lora_alpha=16, lora_dropout=0.1, checkpointing=True),
}


@dataclass(frozen=True)
class Case:
    """What is trained, and how, on all sides."""

    method: str
    recipe: str = "bare"
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """Its key in the results."""
        return self.method if self.recipe == "bare" else f"{self.method}_{self.recipe}"

    @property
    def settings(self) -> Recipe:
        """Those of its recipe."""
        return RECIPES[self.recipe]

    @property
    def mixed(self) -> bool:
        """Whether it runs under autocast."""
        return self.dtype != "float32"


class Clock:
    """Times steps and keeps what they report; the first ones, ``warm``, are left out."""

    def __init__(self, warm: int, timed: int) -> None:
        self.warm, self.total = warm, warm + timed
        self._steps: list[tuple[float, float, int, float]] = []

    def step(self, tokens: int, loss: float) -> None:
        """Say that a step has ended: its tokens, and its loss."""
        self._steps.append((time.perf_counter(), time.process_time(), tokens, loss))

    def peak_mib(self) -> float:
        """The most memory that this process has held."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def facts(self) -> dict[str, float]:
        """Tokens a second, and a second of the processor, memory and the mean loss.

        Seconds of the processor, of all threads together, depend less on what else runs there.
        """
        start, used, _, _ = self._steps[self.warm - 1]
        timed = self._steps[self.warm :]
        tokens = sum(count for _, _, count, _ in timed)
        return {
            "tokens_per_second": tokens / (timed[-1][0] - start),
            "tokens_per_cpu_second": tokens / (timed[-1][1] - used),
            "peak_mib": self.peak_mib(),
            "loss": statistics.fmean(loss for *_, loss in timed),
        }


@dataclass(frozen=True)
class Shape:
    """A model, the length of packed rows, how many make a step, and steps: not timed, timed."""

    config: dict[str, Any]
    max_length: int
    packs_a_step: int
    warm_steps: int = 4
    steps: int = 16
    real_text: bool = False
    """Rows of ``real_text.py`` instead of made-up words."""

    def clock(self) -> Clock:
        """One for a run with this shape."""
        return Clock(self.warm_steps, self.steps)


def _published(config: dict[str, Any], rope_theta: float) -> Shape:
    """A published model with one row of real text to a step; its head shares the embedding."""
    rope = {"rope_type": "default", "rope_theta": rope_theta}
    config |= dict(tie_word_embeddings=True, rope_parameters=rope)
    return Shape(config, max_length=2048, packs_a_step=1, warm_steps=1, steps=2, real_text=True)


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
    # configs as published
    "smollm2_135m": _published(
        dict(model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536)
        | dict(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
        | dict(rms_norm_eps=1e-5, max_position_embeddings=8192),
        rope_theta=1e5,
    ),
    "qwen2_5_0_5b": _published(
        dict(model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864)
        | dict(num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2)
        | dict(rms_norm_eps=1e-6, max_position_embeddings=32768),
        rope_theta=1e6,
    ),
    "qwen3_0_6b": _published(
        dict(model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072)
        | dict(num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
        | dict(rms_norm_eps=1e-6, max_position_embeddings=40960),
        rope_theta=1e6,
    ),
    "qwen2_5_1_5b": _published(
        dict(model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960)
        | dict(num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2)
        | dict(rms_norm_eps=1e-6, max_position_embeddings=131072),
        rope_theta=1e6,
    ),
}


def prepare(folder: Path, shape: Shape) -> None:
    """Save the model with random weights, a tokenizer with a chat template, and the rows."""
    import torch
    from transformers import AutoModelForCausalLM

    tokens = (shape.warm_steps + shape.steps + 1) * shape.packs_a_step * shape.max_length
    write = _write_text if shape.real_text else _write_words
    write(folder, tokens)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(_config(shape)).save_pretrained(folder)


def _config(shape: Shape) -> Any:
    from transformers import AutoConfig

    settings = dict(shape.config) | dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def _save_tokenizer(folder: Path, inner: Any) -> Any:
    """Save a tokenizer whose first tokens are padding, end, user and bot."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<pad>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }}"
        " </s> {% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _write_words(folder: Path, tokens: int) -> None:
    """A word-level tokenizer, and rows of made-up words until they have so many ``tokens``."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = 4000
    names = [*SPECIAL, *(f"w{n}" for n in range(words))]
    inner = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, "<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    _save_tokenizer(folder, inner)
    draw = random.Random(0)

    def text(mean: int) -> str:
        size = max(4, int(draw.lognormvariate(0, 0.7) * mean))
        return " ".join(f"w{draw.randrange(words)}" for _ in range(size))

    rows = []
    while tokens > 0:
        row = {"prompt": text(60), "completion": text(120)}
        tokens -= len(row["prompt"].split()) + len(row["completion"].split())
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows), "utf-8")


def _write_text(folder: Path, tokens: int) -> None:
    """A byte-level BPE tokenizer of the real text, and rows of it: English, Chinese and code."""
    import real_text
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = real_text.corpora()["multi_turn"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    tokenizer = _save_tokenizer(folder, inner)
    rows = []
    for (turn,) in real_text.conversations("text", texts):
        rows.append({"prompt": turn[0], "completion": turn[1]})
        tokens -= sum(map(len, tokenizer(list(turn))["input_ids"]))
        if tokens <= 0:
            break
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")


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


def loading(method: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """The arguments of ``from_pretrained``, on all sides; products are in ``dtype``."""
    if method == "full":
        return {"dtype": "float32"}
    if method == "lora":
        return {"dtype": dtype}
    from transformers import BitsAndBytesConfig

    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"dtype": dtype, "quantization_config": bits}


def adapter(method: str, recipe: Recipe | None = None) -> Any:
    """The ``LoraConfig`` of all sides; None for full training."""
    from peft import LoraConfig

    chosen = recipe or Recipe()
    return None if method == "full" else LoraConfig(task_type="CAUSAL_LM", **chosen.lora())


def mixed_dtype() -> str:
    """What this processor computes products in: bf16, or float32 if that would be emulated."""
    from xtuner.config.adapt.machine import supported_dtype

    return supported_dtype("bfloat16")


def operations(shape: Shape, case: Case, supervised: float) -> float:
    """Operations of the matrix products that a token needs, those of attention not counted.

    Two for each weight in the forward pass, in the gradient of the input, in that of a trained
    weight, and in the forward pass that activation checkpointing repeats.

    Args:
        shape: the model.
        case: how it is trained.
        supervised: the share of the tokens that have a loss; the head is needed for these alone.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(_config(shape))
    head, recipe = model.get_output_embeddings(), case.settings
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    weights = sum(layer.weight.numel() for layer in layers)
    repeated = 2 * recipe.checkpointing
    passes = 6 if case.method == "full" else 4
    low_rank = 0
    if case.method != "full":
        low_rank = recipe.r * sum(sum(layer.weight.shape) for layer in layers)
    found = (passes + repeated) * weights + (6 + repeated) * low_rank
    return found + passes * supervised * head.weight.numel()


def run_ours(
    folder: Path,
    model: dict[str, Any],
    rows: Any,
    batch_size: int,
    clock: Clock,
    device: str = "cpu",
    dtype: str = "bfloat16",
) -> Clock:
    """Train as ``xtuner train`` does.

    Args:
        folder: for the runner's own files.
        model: arguments of ``SupervisedFinetune``.
        rows: packed rows.
        batch_size: how many of them make a step.
        clock: is told of each step.
        device: ``cpu`` or ``cuda``.
        dtype: of the products.
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
            dtype=dtype,
            clip_grad=dict(max_norm=1.0),
            device=device,
        ),
        default_hooks=dict(checkpoint=None, logger=None, progress=None),
        custom_hooks=[Timer()],
        randomness=dict(seed=0),
    )
    runner.train()
    return clock


def matmul_rate(size: int = 2048, device: str = "cpu", dtype: str = "bfloat16") -> float:
    """What this machine's matrix products reach now, in TFLOP/s: the median of 20."""
    return _median_rate(size, device, dtype, time.perf_counter)


def matmul_rate_of_cpu(size: int = 1024, dtype: str = "bfloat16") -> float:
    """Of a second of the processor, of all threads together, likewise."""
    return _median_rate(size, "cpu", dtype, time.process_time)


def _median_rate(size: int, device: str, dtype: str, clock: Callable[[], float]) -> float:
    import torch

    kind = getattr(torch, dtype)
    one, other = (torch.randn(size, size, dtype=kind, device=device) for _ in range(2))
    taken = []
    for _ in range(20):
        begin = clock()
        one @ other
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(clock() - begin)
    return 2 * size**3 / statistics.median(taken) / 1e12


def compared(sides: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The medians of each side's rounds, and ours in proportion to the others'."""
    failures = {
        side: run for side, runs in sides.items() for run in reversed(runs) if "failed" in run
    }
    medians: dict[str, Any] = {
        side: {key: middle([run[key] for run in runs]) for key in runs[0]}
        | {"lowest_and_highest": spread([run["tokens_per_second"] for run in runs])}
        for side, runs in sides.items()
        if side not in failures
    }
    ratios = {
        f"{what}_of_{us}_to_{side}": medians[us][key] / medians[side][key]
        for us in medians
        if us.startswith("ours")
        for side in medians
        if not side.startswith("ours")
        for what, key in RATIOS.items()
        if key in medians[side]
    }
    return medians | failures | ratios


def middle(values: list[Any]) -> Any:
    """The median of numbers; the first of what is none."""
    return values[0] if isinstance(values[0], str) else statistics.median(values)


def spread(values: list[float]) -> list[float]:
    """The lowest and the highest."""
    return [min(values), max(values)]


def circumstances() -> dict[str, Any]:
    """When, where and with what a method was measured."""
    return machine("torch", "transformers", "trl", "peft", "bitsandbytes")


def machine(*packages: str) -> dict[str, Any]:
    """The date, this machine, and the versions of some packages."""
    from importlib.metadata import version

    return {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {name: version(name) for name in packages},
    }


def processor() -> str:
    """The processor as Linux names it, with the widest of its vector units."""
    facts = Path("/proc/cpuinfo")
    if not facts.exists():
        return platform.machine()
    lines = [line.partition(":") for line in facts.read_text("utf-8").splitlines()]
    known = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    flags = set(known.get("flags", "").split())
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if unit in flags]
    return ", ".join([known.get("model name", platform.machine()), *units[:1]])
