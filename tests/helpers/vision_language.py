"""A tiny CLIP, its image processor, and pictures, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZE, PATCH, WIDTH = 32, 8, 32
PATCHES = (SIZE // PATCH) ** 2


def make_clip(**overrides: Any) -> Any:
    """A CLIP vision model: three layers of width 32, random weights (seeded by the caller)."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    settings = dict(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    return CLIPVisionModel(CLIPVisionConfig(**{**settings, **overrides}))


def make_image_processor() -> Any:
    """What makes (3, 32, 32) of a picture."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )


def save_clip(folder: Path, seed: int = 0) -> Path:
    """A folder as the hub has it."""
    import torch

    torch.manual_seed(seed)
    make_clip().save_pretrained(folder)
    make_image_processor().save_pretrained(folder)
    return folder


def save_square(file: Path, color: str) -> Path:
    """A picture that is all of one color."""
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 24), color).save(file)
    return file
