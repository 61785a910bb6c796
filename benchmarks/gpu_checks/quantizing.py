"""Models with random weights in 4 bits, made where they are trained."""

from __future__ import annotations

from typing import Any

import torch


def quantize(model: Any, device: str) -> None:
    """Put the linear layers but the head into 4 bits (nf4, double quantisation), one by one."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, torch.nn.Linear) or layer is model.get_output_embeddings():
            continue
        settings = dict(compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
        quantized = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, **settings
        )
        quantized.bias = layer.bias
        quantized.weight = bnb.nn.Params4bit(
            layer.weight.detach(), quant_type="nf4", compress_statistics=True, module=quantized
        ).to(device)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, quantized)
        del layer
    model.is_loaded_in_4bit = True  # as transformers says it to peft
