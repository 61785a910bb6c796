"""7B models on one GPU: tokens/s, share of what its matrix products reach, peak memory.

Llama-2-7B and Qwen2.5-7B with random weights, which are made on the GPU; full training (weights in
float32), LoRA (base in bf16) and QLoRA (base in 4 bits: nf4, double quantisation), each on one
sample of 2k, 8k and 32k tokens a step, in bf16 autocast with activation checkpointing, by the
runner of ``xtuner train``. Each case has a process of its own; one that does not fit says so.

    python benchmarks/gpu.py [--shapes llama2_7b qwen2_5_7b] [--methods full lora qlora]
                             [--lengths 2048 8192 32768]

Writes ``results/gpu.json`` and the table ``results/gpu.md``. Without a GPU it ends with status 2;
``--shapes tiny --device cpu --results /tmp`` tries it out there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import measuring

SHAPES: dict[str, dict[str, Any]] = {
    "llama2_7b": dict(model_type="llama", vocab_size=32000, hidden_size=4096)
    | dict(intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    | dict(num_key_value_heads=32, max_position_embeddings=32768),
    "qwen2_5_7b": dict(model_type="qwen2", vocab_size=152064, hidden_size=3584)
    | dict(intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28)
    | dict(num_key_value_heads=4, max_position_embeddings=32768, tie_word_embeddings=False),
    "tiny": dict(model_type="llama", vocab_size=512, hidden_size=64, intermediate_size=128)
    | dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
}
WARM_STEPS, STEPS = 2, 8
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "flash-attn", "liger-kernel")


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    shape: str
    method: str
    length: int
    device: str


def build_llm(shape: str, method: str, device: str) -> Any:
    """A transformers model with random weights, made where it is trained."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from xtuner.model.modules import attention

    settings = dict(SHAPES[shape])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    dtype = torch.float32 if method == "full" else torch.bfloat16
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention.register()
        )
    if method == "qlora":
        quantise(model, device)
    return model


def quantise(model: Any, device: str) -> None:
    """Put the linear layers but the head into 4 bits, one after the other."""
    import bitsandbytes as bnb
    import torch

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, torch.nn.Linear) or layer is model.get_output_embeddings():
            continue
        settings = dict(compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
        quantised = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, **settings
        )
        quantised.bias = layer.bias
        quantised.weight = bnb.nn.Params4bit(
            layer.weight.detach(), quant_type="nf4", compress_statistics=True, module=quantised
        ).to(device)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, quantised)
        del layer
    model.is_loaded_in_4bit = True  # as transformers says it to peft


def flops_a_token(llm: Any, method: str, length: int) -> float:
    """Of the products of a step, without those that are computed again for checkpointing.

    A weight takes 2 forward, 2 for the gradient of its input and, if trained, 2 for its own;
    attention, causal, twice as many backward as forward. The adapter is left out.
    """
    import torch

    linears = [layer for layer in llm.modules() if isinstance(layer, torch.nn.Linear)]  # 4 bits too
    weights = sum(layer.in_features * layer.out_features for layer in linears)
    wide = llm.config.hidden_size * llm.config.num_hidden_layers
    return (6.0 if method == "full" else 4.0) * weights + 3 * 2 * 2 * (length / 2) * wide


def measure(case: Case, folder: Path) -> dict[str, float]:
    """Train some steps and say how it went."""
    import torch

    class GpuClock(measuring.Clock):
        def step(self, tokens: int, loss: float) -> None:
            torch.cuda.synchronize()
            super().step(tokens, loss)

        def peak_mib(self) -> float:
            return torch.cuda.max_memory_allocated() / 2**20

    torch.manual_seed(0)
    on_gpu = case.device == "cuda"
    rate = measuring.matmul_rate(8192 if on_gpu else 256, case.device)
    llm = build_llm(case.shape, case.method, case.device)
    work = flops_a_token(llm, case.method, case.length)
    draw = torch.Generator().manual_seed(0)
    ids = [
        torch.randint(llm.config.vocab_size, (case.length,), generator=draw).tolist()
        for _ in range(WARM_STEPS + STEPS)
    ]
    rows = [{"input_ids": row, "labels": row, "cumulative_len": [0, len(row)]} for row in ids]
    model = dict(llm=llm, lora=measuring.adapter(case.method), use_activation_checkpointing=True)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # what quantising took is not training's
    clock = (GpuClock if on_gpu else measuring.Clock)(WARM_STEPS, STEPS)
    facts = measuring.run_ours(folder, model, rows, 1, clock, case.device).facts()
    done = facts["tokens_per_second"] * work / 1e12
    return facts | {"model_tflops": done, "share_of_matmul": done / rate, "matmul_tflops": rate}


def run(case: Case) -> dict[str, Any]:
    """Measure in a process of its own; its last words where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--device", case.device, "--folder", folder]
        words += ["--shapes", case.shape, "--methods", case.method, "--lengths", str(case.length)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    if "OutOfMemoryError" in done.stderr:
        return {"failed": "out of memory"}
    return {"failed": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}


def table(cases: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| model | method | tokens a step | tokens/s | of matmul | peak GiB |",
        "|---" * 6 + "|",
    ]
    for case in cases:
        start = f"| {case['shape']} | {case['method']} | {case['length']:,} |"
        if "failed" in case:
            lines.append(f"{start} {case['failed']} | | |")
            continue
        share, gib = case["share_of_matmul"], case["peak_mib"] / 1024
        lines.append(f"{start} {case['tokens_per_second']:,.0f} | {share:.0%} | {gib:.1f} |")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> int:
    """Run the cases and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    real = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=real)
    parser.add_argument(
        "--methods", nargs="+", choices=measuring.METHODS, default=list(measuring.METHODS)
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--results", type=Path, default=measuring.RESULTS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a GPU; here torch sees none.", file=sys.stderr)
        return 2
    chosen = [
        Case(shape, method, length, args.device)
        for shape, method, length in itertools.product(args.shapes, args.methods, args.lengths)
    ]
    if args.folder:
        print("\n" + json.dumps(measure(chosen[0], args.folder)))
        return 0
    found: list[dict[str, Any]] = []
    for case in chosen:
        found.append(vars(case) | run(case))
        print(json.dumps(found[-1]), flush=True)
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    result = {"date": date.today().isoformat(), "card": card, "versions": versions()}
    (args.results / "gpu.json").write_text(
        json.dumps(result | {"cases": found}, indent=1) + "\n", "utf-8"
    )
    with_what = ", ".join(f"{name} {version}" for name, version in versions().items())
    text = f"{result['date']}, {card}; {with_what}.\n\n{table(found)}\n"
    (args.results / "gpu.md").write_text(text, "utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
