"""Bases with parts that training a language model does not build."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def add_mtp(base: Path) -> dict[str, torch.Tensor]:
    """Add tensors of multi-token prediction to a folder with one file of weights."""
    tensors = {"mtp.layers.0.weight": torch.randn(4, 4), "mtp.norm.weight": torch.randn(4)}
    save_file(tensors, base / "mtp.safetensors", metadata={"format": "pt"})
    with safe_open(base / "model.safetensors", framework="pt") as opened:
        places = dict.fromkeys(opened.keys(), "model.safetensors")
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    places = dict.fromkeys(places, "model-1.safetensors")
    index = {"metadata": {}, "weight_map": places | dict.fromkeys(tensors, "mtp.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def save_with_vision(folder: Path) -> Path:
    """Save a tiny Qwen3.5 as on the hub: with a visual encoder, without a tokenizer."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "layer_types": ["full_attention"],
        "max_position_embeddings": 128,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 8,
        "num_position_embeddings": 16,
    }
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=text, vision_config=vision)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    return folder
