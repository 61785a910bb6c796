"""``val_size``: a part of the training data becomes the validation data of the same run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

from xtuner.config.adapt.engine_types import DEFAULT_SAMPLER
from xtuner.config.values import last_name
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

# The builders that can keep rows from training.
SPLIT_BY = (
    "process_hf_dataset",
    "process_ms_dataset",
    "VisionLanguageDataset",
    "VisionLanguagePreferenceDataset",
)


def adapt_validation_split(config: Config) -> list[str]:
    """Give a config with ``val_size`` a validation dataloader.

    Args:
        config: a loaded config; changed in place.

    Returns:
        One line that says so; none without ``val_size``.

    Raises:
        UserError: where there is validation data already, or the training data cannot be split.
    """
    size = config.pop("val_size", 0)
    if not size:
        return []
    if config.get("val_dataloader") is not None:
        raise _refused(
            tr("there is a val_dataloader already."),
            tr("set val_size=0, or leave the val_dataloader out."),
        )
    training = config.get("train_dataloader") or {}
    datasets = list(_leaves(training.get("dataset")))
    others = sorted({last_name(dict.get(dataset, "type")) for dataset in datasets} - {*SPLIT_BY})
    if others or not datasets:
        raise _refused(
            tr(
                "it splits data of {kinds}, not of {others}.",
                kinds=", ".join(SPLIT_BY),
                others=", ".join(others) or "-",
            ),
            tr("give a val_dataloader instead."),
        )
    for dataset in datasets:
        dataset["val_size"] = size
    validation = copy.deepcopy(training)
    for dataset in _leaves(validation["dataset"]):
        dataset["part"] = "val"
    validation.pop("batch_sampler", None)
    validation["sampler"] = dict(type=DEFAULT_SAMPLER, shuffle=False)
    config.val_dataloader = validation
    return [tr("val_size={size}: of each dataset so much is kept for validation.", size=size)]


def _leaves(dataset: object) -> Iterator[dict[str, Any]]:
    """The datasets that are read, within those that only join others."""
    if isinstance(dataset, dict) and "datasets" in dataset:
        for each in dataset["datasets"]:
            yield from _leaves(each)
    elif isinstance(dataset, dict):
        yield dataset


def _refused(text: str, hint: str) -> UserError:
    return UserError(text, hint=hint, where=Where(key="val_size"))
