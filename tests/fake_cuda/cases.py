"""What is trained for two steps on a fake GPU, and what was found."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """A model, rows, libraries and a GPU.

    Attributes:
        method: ``full``, ``lora`` or ``qlora``.
        rows: ``packed`` or ``padded``.
        task: ``sft``, ``dpo``, ``reward``, ``llava``, ``loss`` (of hidden states alone), or a
            ``model_type`` with images.
        flash_attn: ``absent``, ``present`` or ``broken`` (built for another torch).
        capability: compute capability of the GPU.
        shape: a key of ``SHAPES``.
        layers: how many.
        tokens: of a micro-batch.
        rank: of adapters.
        dropout: of adapters.
        offload: whether the inputs of layers are kept in main memory.
        optimizer: ``AdamW``, or a class of bitsandbytes.
    """

    method: str = "full"
    rows: str = "packed"
    task: str = "sft"
    flash_attn: str = "absent"
    capability: tuple[int, int] = (9, 0)
    shape: str = "tiny"
    layers: int = 2
    tokens: int = 256
    rank: int = 16
    dropout: float = 0.0
    offload: bool = False
    optimizer: str = "AdamW"


@dataclass
class Found:
    """What the second step of a case asked of the GPU.

    Attributes:
        error: the error that ended the case; empty where none did.
        attention: the backend that computed attention.
        waits: of the CPU for the GPU, by operation and line.
        launches: kernels of forward, backward and optimizer.
        gigabytes: read and written by them.
        peak_gib: most memory that was allocated at once.
        weights_gib: memory of the model before the first step.
        states: tensors of the optimizer after it was saved and resumed, by where they are: ``gpu``,
            ``main memory`` or ``paged``.
    """

    error: str = ""
    attention: str = ""
    waits: dict[str, int] = field(default_factory=dict)
    launches: int = 0
    gigabytes: float = 0.0
    peak_gib: float = 0.0
    weights_gib: float = 0.0
    states: dict[str, int] = field(default_factory=dict)


SHAPES = {
    "tiny": dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "qwen2_5_7b": dict(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "qwen2_5_0_5b": dict(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_attention_heads=14,
        num_key_value_heads=2,
    ),
    "llama2_7b": dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
}
