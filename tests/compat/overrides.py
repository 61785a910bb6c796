"""Whether overrides of a config's settings reach what is computed from them."""

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


def _batch_size(loader: dict[str, Any]) -> Any:
    inner = dict.get(loader, "batch_sampler") or {}
    return dict.get(loader, "batch_size") or dict.get(inner, "batch_size")
