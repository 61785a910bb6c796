"""What proofs compute with: models, samples and batches of a config."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from torch import Tensor
from torch.utils.data import Dataset

from xtuner.config.values import iter_dicts
from xtuner.model.backends import environment
from xtuner.proving.training import move_adapter, token_ids
from xtuner.registry import BUILDER
from xtuner.utils.constants import PREFERENCE_SIDES

Sample = Mapping[str, Any]
INITIAL = "initial.pth"
"""The trained weights with which proofs begin, a checkpoint beside the config."""
CPU = torch.device("cpu")
_PACKED = ("pack_to_max_length", "use_varlen_attn")


class Subject:
    """A config's model and data, as its run builds them.

    Args:
        config: the written config, in float32, its rows a sample.
    """

    def __init__(self, config: Path) -> None:
        from xtuner.config.adapt.adapter import RunOptions, adapt
        from xtuner.config.load import load

        document = adapt(load(str(config)), RunOptions(work_dir=str(config.parent / "subject")))
        self.cfg: Config = document.config

    @property
    def packs(self) -> bool:
        """Whether samples share rows without seeing each other."""
        return bool(self.cfg.model.get("use_varlen_attn"))

    @property
    def joins(self) -> bool:
        """Whether samples share rows and see each other, as published configs without varlen do."""
        settings = [part for _, part in iter_dicts(self.cfg.train_dataloader.dataset)]
        packed = any(part.get("pack_to_max_length") for part in settings)
        return packed and not self.packs

    @property
    def is_supervised(self) -> bool:
        """Whether the loss is the cross-entropy of the labels."""
        from xtuner.model.image_text import VisionLanguageFinetune
        from xtuner.model.sft import SupervisedFinetune

        return self.cfg.model.type in (SupervisedFinetune, VisionLanguageFinetune)

    def model(self, device: torch.device = CPU, **changes: object) -> Any:
        """The config's model in evaluation mode, its adapter's weights away from their start.

        Args:
            device: where it computes, by the functions that suit it.
            changes: to the config's ``model``.
        """
        settings = {**self.cfg.model, "use_activation_checkpointing": False, "compile": False}
        if settings.get("lora"):
            settings["lora"] = {**settings["lora"], "lora_dropout": 0.0}
        torch.manual_seed(0)
        with environment.training_on(device):
            built = BUILDER.build(ConfigDict({**settings, **changes}))
        move_adapter(built)
        return built.to(device).eval()

    @functools.cached_property
    def rows(self) -> list[Sample]:
        """The rows of the training data as they are trained."""
        return _rows_of(BUILDER.build(self.cfg.train_dataloader.dataset))

    @functools.cached_property
    def samples(self) -> list[Sample]:
        """The samples of the training data, one to a row."""
        return _rows_of(BUILDER.build(unpacked(self.cfg.train_dataloader.dataset)))

    def batch(self, rows: Sequence[Sample]) -> Any:
        """A micro-batch of rows, by the config's collate function."""
        settings = dict(self.cfg.train_dataloader.collate_fn)
        collate = settings.pop("type")
        return collate(rows, **settings)["data"]

    def plain_inputs(self, sample: Sample, known: Container[str]) -> Mapping[str, Tensor]:
        """What a class of transformers takes of a sample: its tokens, images and token types.

        Args:
            sample: of ``rows`` or ``samples``.
            known: the arguments of the class's ``forward``.
        """
        from xtuner.model.modules.image_rows import TOKEN_TYPES

        if "images" not in sample:
            return token_ids(sample)
        data = self.batch([sample])
        inputs = {"input_ids": data["input_ids"], **data.get("images", {})}
        inputs |= dict.fromkeys(TOKEN_TYPES, data["mm_token_type_ids"])
        return {name: value for name, value in inputs.items() if name in known}


def iter_ids(sample: Sample) -> Iterator[Sequence[int]]:
    """The token ids of a sample, or of the answers of a pair."""
    names = ("input_ids", "chosen_ids", "rejected_ids")
    parts = [sample[side] for side in PREFERENCE_SIDES if side in sample] or [sample]
    return (part[name] for part in parts for name in names if name in part)


def unpacked(settings: Mapping[str, Any]) -> Any:
    """The settings of a dataset, with each sample in a row of its own."""
    changed = ConfigDict(settings).copy()
    for _, part in iter_dicts(changed):
        for name in _PACKED:
            if name in part:
                part[name] = False
    return changed


def _rows_of(dataset: Dataset[Sample]) -> list[Sample]:
    return [dict(dataset[number]) for number in range(len(dataset))]  # type: ignore[arg-type]
