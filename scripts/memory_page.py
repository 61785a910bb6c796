"""Write the tables of ``docs/*/memory.md``: what ``xtuner plan`` computes for common models.

``python scripts/memory_page.py``, a few minutes. Nothing is downloaded: the sizes below are those
of the models' ``config.json``.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.tiny import make_tokenizer
from xtuner.config.load import load
from xtuner.config.override import override
from xtuner.planning.memory import Memory
from xtuner.planning.plan import Machine, Planner

ROOT = Path(__file__).parent.parent
GIB = 2**30
LENGTHS = (2048, 8192)
METHODS = {
    "full": ("qwen3_8b_full_custom_sft_e1", ()),
    "full, 8-bit": ("qwen3_8b_full_custom_sft_e1", ("optim_type=bitsandbytes.optim.AdamW8bit",)),
    "LoRA": ("qwen3_8b_lora_custom_sft_e1", ()),
    "QLoRA": ("qwen3_8b_qlora_custom_sft_e1", ()),
}
"""Column -> a config of the catalogue whose model is replaced, and what is changed in it."""


@dataclass(frozen=True)
class Model:
    """A model by the sizes of its ``config.json``.

    Attributes:
        name: as people call it.
        kind: ``model_type``.
        sizes: (hidden_size, intermediate_size, layers, heads, key-value heads, vocabulary).
        more: other settings that change sizes.
    """

    name: str
    kind: str
    sizes: tuple[int, int, int, int, int, int]
    more: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write a folder that ``xtuner plan`` takes for the model."""
        names = (
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "vocab_size"),
        )
        settings = dict(zip(names, self.sizes, strict=True)) | self.more
        config = AutoConfig.for_model(self.kind, dtype="bfloat16", **settings)
        config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
        config.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)


TIED = {"tie_word_embeddings": True}
QWEN3 = {"head_dim": 128}
MODELS = (
    Model("Qwen2.5 0.5B", "qwen2", (896, 4864, 24, 14, 2, 151936), TIED),
    Model("Qwen2.5 1.5B", "qwen2", (1536, 8960, 28, 12, 2, 151936), TIED),
    Model("Qwen3 4B", "qwen3", (2560, 9728, 36, 32, 8, 151936), QWEN3 | TIED),
    Model("Llama 2 7B", "llama", (4096, 11008, 32, 32, 32, 32000)),
    Model("Qwen2.5 7B", "qwen2", (3584, 18944, 28, 28, 4, 152064)),
    Model("Llama 3.1 8B", "llama", (4096, 14336, 32, 32, 8, 128256)),
    Model("Qwen3 8B", "qwen3", (4096, 12288, 36, 32, 8, 151936), QWEN3),
    Model("Qwen3 14B", "qwen3", (5120, 17408, 40, 40, 8, 151936), QWEN3),
    Model("Qwen3 30B-A3B", "qwen3_moe", (2048, 6144, 48, 32, 4, 151936),
          QWEN3 | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}),
    Model("Qwen3 32B", "qwen3", (5120, 25600, 64, 64, 8, 151936), QWEN3),
    Model("Llama 3.1 70B", "llama", (8192, 28672, 80, 64, 8, 128256)),
)  # fmt: skip
LLAMA_3_8B = MODELS[5]
QWEN_7B = Model("Qwen 7B", "llama", (4096, 11008, 32, 32, 32, 151936), {"attention_bias": True})
"""Its first version has the shape of Llama 2 7B with another vocabulary."""


@dataclass(frozen=True)
class Published:
    """A measurement that somebody published.

    Attributes:
        model: what was trained.
        method: a key of ``METHODS``.
        batch, length: of a micro-batch, in rows and tokens.
        rank: of the adapter.
        measured: peak memory in GiB, as the source has it.
        whole_logits: whether the source's code keeps the logits of all tokens at once.
        source: where it stands.
        dropout: of the adapter, as the source trains it; None for the config's own.
    """

    model: Model
    method: str
    batch: int
    length: int
    rank: int
    measured: float
    whole_logits: bool
    source: str
    dropout: float | None = None

    @property
    def logits(self) -> float:
        """GiB of logits that ours never has whole: bfloat16, float32, and the gradient's."""
        if not self.whole_logits:
            return 0.0
        return self.batch * self.length * self.model.sizes[-1] * (2 + 4 + 4) / GIB


_QWEN = "https://github.com/QwenLM/Qwen/blob/03cd81f5e4da/README.md"
_TORCHTUNE = "https://github.com/pytorch/torchtune/blob/0031bfb080bd/README.md"
PUBLISHED = (
    Published(LLAMA_3_8B, "QLoRA", 2, 2048, 8, 7.4, False, _TORCHTUNE, 0.0),
    Published(LLAMA_3_8B, "LoRA", 2, 2048, 8, 16.2, False, _TORCHTUNE, 0.0),
    Published(QWEN_7B, "QLoRA", 1, 2048, 64, 13.9, True, _QWEN),
    Published(QWEN_7B, "LoRA", 1, 2048, 64, 23.8, True, _QWEN),
    Published(QWEN_7B, "LoRA", 1, 8192, 64, 36.6, True, _QWEN),
)


def memory_of(model: Model, method: str, *options: str) -> Memory:
    """Plan a run of a model in one process."""
    config, changes = METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder))
        words = (f"pretrained_model_name_or_path={folder}", *changes, *options)
        return Planner().plan(override(load(config), words), Machine()).memory


def row(model: Model) -> str:
    """A model's line in the table of all methods."""
    cells = [
        f"{memory_of(model, method, f'max_length={length}').total / GIB:.1f}"
        for length in LENGTHS
        for method in METHODS
    ]
    return f"| {model.name} | {' | '.join(cells)} |"


def published_row(each: Published) -> str:
    """A published measurement beside the plan of the same settings."""
    options = [
        f"max_length={each.length}",
        f"batch_size={each.batch}",
        f"model.lora.r={each.rank}",
    ]
    if each.dropout is not None:
        options.append(f"model.lora.lora_dropout={each.dropout}")
    memory = memory_of(each.model, each.method, *options)
    tensors = (memory.total - memory.libraries - memory.margin) / GIB
    host = re.sub(r"https://github\.com/([^/]+/[^/#]+).*", r"\1", each.source)
    logits = f"{each.logits:.1f}" if each.logits else "–"
    return (
        f"| {each.model.name} | {each.method} | {each.batch} x {each.length:,} | "
        f"{each.measured:.1f} | {tensors:.1f} | {logits} | [{host}]({each.source}) |"
    )


def tables() -> Iterator[tuple[str, list[str]]]:
    """(name of the marker, lines) of each table."""
    yield "models", [row(model) for model in MODELS]
    yield "published", [published_row(each) for each in PUBLISHED]


def main() -> None:
    """Put the lines below the head of each table, between its markers, in both languages."""
    found = dict(tables())
    for language in ("en", "zh_cn"):
        path = ROOT / "docs" / language / "memory.md"
        text = path.read_text("utf-8")
        for name, lines in found.items():
            pattern = rf"(<!-- {name} -->\n(?:.*\n){{2}})(?:.*\n)*?(<!-- end -->)"
            body = "".join(f"{line}\n" for line in lines)
            text = re.sub(pattern, lambda match, body=body: match[1] + body + match[2], text)
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
