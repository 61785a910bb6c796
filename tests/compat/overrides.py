"""Whether a config's settings, and overrides of them, reach what is computed from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from xtuner.config.document import ConfigDocument
from xtuner.config.override import override

SETTINGS = {
    "lr": 1.25e-5,
    "batch_size": 7,
    "max_length": 1100,
    "accumulative_counts": 5,
    "max_epochs": 11,
}


def lengths(value: Any) -> Iterator[Any]:
    """The ``max_length`` of the datasets in a dataloader."""
    if isinstance(value, dict):
        for key in dict.keys(value):
            inner = dict.__getitem__(value, key)
            if key == "max_length":
                yield inner
            else:
                yield from lengths(inner)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from lengths(item)


def unreached(document: ConfigDocument) -> list[str]:
    """The overrides that do not arrive where training takes them from."""
    plain = document.values
    words = [f"{key}={value}" for key, value in SETTINGS.items() if key in plain]
    values = override(document, words).values
    if plain.get("framework") == "huggingface":
        wanted = SETTINGS["max_length"]
        return [] if set(lengths(values["train_dataset"])) == {wanted} else ["max_length"]
    parallel = plain.get("sequence_parallel_size", 1)
    loader, wrapper = values["train_dataloader"], values["optim_wrapper"]
    arrived = {
        "lr": wrapper["optimizer"]["lr"] == SETTINGS["lr"],
        "batch_size": _batch_size(loader) == SETTINGS["batch_size"],
        "max_length": set(lengths(loader)) <= {SETTINGS["max_length"]},
        "accumulative_counts": wrapper["accumulative_counts"]
        in (SETTINGS["accumulative_counts"], SETTINGS["accumulative_counts"] * parallel),
        "max_epochs": dict.get(values["train_cfg"], "max_epochs")
        in (SETTINGS["max_epochs"], None if dict.get(values["train_cfg"], "max_iters") else 0),
    }
    return [key for key, there in arrived.items() if not there]


def inconsistent(document: ConfigDocument) -> list[str]:
    """The settings that differ from what is computed from them."""
    values = document.values
    if values.get("framework") == "huggingface":
        return []
    wrapper, loader, cycle = (
        values[key] for key in ("optim_wrapper", "train_dataloader", "train_cfg")
    )
    epochs, accumulated = values["max_epochs"], values["accumulative_counts"]
    parallel = values.get("sequence_parallel_size", 1)
    warmup, decay = values["param_scheduler"]
    packed = values.get("use_varlen_attn") and "pack_to_max_length" in values
    agree = {
        "lr": wrapper["optimizer"]["lr"] == values["lr"],
        "accumulative_counts": wrapper["accumulative_counts"]
        in (accumulated, accumulated * parallel),
        "batch_size": loader["batch_size"] == values["batch_size"],
        "max_epochs": cycle["max_epochs"] == epochs,
        "warmup_ratio": warmup["end"] == decay["begin"] == values["warmup_ratio"] * epochs,
        "pack_to_max_length": not packed
        or (values["batch_size"] == 1 and values["pack_to_max_length"]),
    }
    return [key for key, same in agree.items() if not same]


def _batch_size(loader: dict[str, Any]) -> Any:
    inner = dict.get(loader, "batch_sampler") or {}
    return dict.get(loader, "batch_size") or dict.get(inner, "batch_size")
