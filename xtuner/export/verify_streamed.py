"""Verification of large exports: what was written is read again, one tensor at a time.

The expected weights are computed from the inputs, for LoRA by its definition and not by peft's code
that wrote them. Memory is bounded by a few tensors, so models of any size can be verified.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xtuner.export.model_folder import read_json
from xtuner.export.streaming_merge import ADAPTER, StreamingMerge
from xtuner.export.verify import check_tensor, check_weights
from xtuner.export.weights import Weights
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from peft import PeftConfig


def check_merged(merge: StreamingMerge, folder: Path) -> None:
    """Check a merged model against its base and adapter.

    Args:
        merge: what was written.
        folder: where to.

    Raises:
        UserError: naming the weights that are not those expected, rounded to their dtype.
    """
    written = Weights(folder)
    _check_names(written, {info.name for info in merge.plan})
    for name in written.infos:
        check_tensor(name, _expected(merge, name), written.read(name), _before(merge, name))
    tied = read_json(folder / "config.json").get("tie_word_embeddings", False)
    for name, source in merge.tied.items() if tied else ():
        if name in written.infos and source in written.infos:
            check_tensor(name, written.read(source), written.read(name))
    say_verified(len(written.infos))


def check_trained(
    trained: Mapping[str, torch.Tensor], folder: Path, base: Path | None = None
) -> None:
    """Check a model's or an adapter's files against the checkpoint they were converted from.

    Args:
        trained: the weights as trained, under their names in the files.
        folder: what was written.
        base: the folder of the base, of which a full model may have further tensors.

    Raises:
        UserError: naming the weights that are not those expected, rounded to their dtype.
    """
    files = (folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    written = Weights(next((file for file in files if file.is_file()), folder))
    copied = written.infos.keys() - trained.keys()
    others = Weights(base) if base is not None and copied else None
    _check_names(written, {*trained, *(copied if others else ())})
    for name in written.infos:
        expected = trained[name] if name in trained else others.read(name) if others else None
        check_tensor(name, expected, written.read(name))
    say_verified(len(written.infos))


def _check_names(written: Weights, expected: set[str]) -> None:
    wrong = dict.fromkeys(written.infos.keys() ^ expected, torch.empty(0))
    check_weights(wrong, {}, torch.float32)


def _before(merge: StreamingMerge, name: str) -> torch.Tensor | None:
    """The base's tensor, where the adapter adds to it."""
    return None if _layer(merge, name) is None else merge.base.read(merge.tied.get(name, name))


def _layer(merge: StreamingMerge, name: str) -> Any:
    module, _, kind = name.rpartition(".")
    return merge.layers.get(module) if kind in ("weight", "bias") else None


def _expected(merge: StreamingMerge, name: str) -> torch.Tensor:
    layer = _layer(merge, name)
    if layer is None:
        own = merge.replaced.get(name)
        return merge.base.read(merge.tied.get(name, name)) if own is None else own
    plain = name.endswith(".weight") and adds_product(merge.config, layer)
    delta = lora_product(layer) if plain else None
    if delta is None:
        return merge.compute(name)
    return merge.base.read(merge.tied.get(name, name)).float() + delta


def adds_product(config: PeftConfig, layer: object) -> bool:
    """Whether merging a layer adds a product to the base's weight, and does nothing else."""
    initial = getattr(config, "init_lora_weights", True)
    changed = isinstance(initial, str) and initial.lower() != "gaussian"
    return not (changed or getattr(layer, "use_dora", {}).get(ADAPTER))


def lora_product(layer: Any) -> torch.Tensor | None:
    """``scaling * B A`` of plain LoRA, as the base has its weight; None for other adapters."""
    pairs: Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        (getattr(layer, f"{kind}_A", {}), getattr(layer, f"{kind}_B", {}))
        for kind in ("lora", "lora_embedding")
    )
    for number, (inner, outer) in enumerate(pairs):
        if ADAPTER not in inner:
            continue
        low, high = (getattr(part[ADAPTER], "weight", part[ADAPTER]) for part in (inner, outer))
        if low.dim() != 2:
            return None
        product: torch.Tensor = layer.scaling[ADAPTER] * (
            high.detach().float() @ low.detach().float()
        )
        transposed = number == 1 or getattr(layer, "fan_in_fan_out", False)
        return product.T if transposed else product
    return None


def say_verified(count: int) -> None:
    """Print that so many tensors were read again."""
    print(
        tr(
            "verified: {count} tensors were read again; each is the expected one, rounded",
            count=count,
        )
    )
