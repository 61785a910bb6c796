"""What each way to spread a model costs on paper: memory of a GPU, bytes it sends in a step.

    python benchmarks/on_paper.py

P parameters, T of them trained, N processes, A micro-batches of a step. A ring sends (N-1)/N of
what is gathered or reduced, an all-reduce twice that. Prints the tables of
``docs/en/distributed.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

GIGA = 1e9
PROCESSES = (8, 64, 512)
TOKENS = 8192  # of a micro-batch of one GPU
SPEED = 400e12  # operations/s that a GPU reaches in matrix products
LINKS = {8: 350e9, 64: 45e9, 512: 45e9}  # bytes/s of a GPU: NVLink in a machine, 400 Gb/s between


@dataclass(frozen=True)
class Way:
    """Bytes of a GPU, beside activations, and bytes that it sends; of (P, T, N, A)."""

    name: str
    memory: Callable[[float, float, int], float]
    sent: Callable[[float, float, int, int], float]


def ring(size: float, processes: int) -> float:
    """Bytes a process sends to gather, or to reduce, a tensor of ``size`` bytes."""
    return size * (processes - 1) / processes


# Under DDP and FSDP trained weights are float32 (4), their gradients too (4), AdamW has 8. Under
# DeepSpeed weights and gradients are bf16 (2 + 2); float32 copies and AdamW have 12. Frozen: 2.
WAYS = (
    Way("DDP", lambda p, t, n: 2 * (p - t) + 16 * t, lambda p, t, n, a: 2 * ring(4 * t, n)),
    Way(
        "ZeRO-1",
        lambda p, t, n: 2 * p + 2 * t + 12 * t / n,
        lambda p, t, n, a: 2 * ring(2 * t, n),
    ),
    Way(
        "ZeRO-2",
        lambda p, t, n: 2 * p + 14 * t / n,
        lambda p, t, n, a: a * ring(2 * t, n) + ring(2 * t, n),
    ),
    Way(
        "ZeRO-3",
        lambda p, t, n: (2 * p + 14 * t) / n,
        lambda p, t, n, a: a * (2 * ring(2 * p, n) + ring(2 * t, n)),
    ),
    Way(
        "FSDP",
        lambda p, t, n: (2 * (p - t) + 16 * t) / n,
        lambda p, t, n, a: a * (2 * ring(2 * p, n) + ring(4 * t, n)),
    ),
)
CASES = (("7B, full", 7e9, 7e9), ("7B, LoRA r=16", 7e9, 40e6), ("70B, full", 70e9, 70e9))


def table(name: str, parameters: float, trained: float, micro_batches: int = 1) -> str:
    """A table in Markdown for one model."""
    lines = [f"**{name}** (GB of memory; GB sent in a step, and seconds for it)", ""]
    lines.append("| | " + " | ".join(f"{n} GPUs" for n in PROCESSES) + " |")
    lines.append("|---" * (len(PROCESSES) + 1) + "|")
    for way in WAYS:
        cells = []
        for count in PROCESSES:
            sent = way.sent(parameters, trained, count, micro_batches)
            memory = way.memory(parameters, trained, count) / GIGA
            cells.append(f"{memory:.3g}; {sent / GIGA:.3g}, {sent / LINKS[count]:.2g} s")
        lines.append(f"| {way.name} | " + " | ".join(cells) + " |")
    seconds = 8 * parameters * TOKENS / SPEED
    if trained < parameters:
        seconds *= 0.75  # frozen weights have no gradient of their own
    lines += ["", f"A micro-batch of {TOKENS:,} tokens computes for {seconds:.2g} s meanwhile."]
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    print("\n\n".join(table(*case) for case in CASES))


if __name__ == "__main__":
    main()
