"""A prepared dataset: a folder with its tokens, and a config that trains on that folder.

``OUT/dataset`` is an Arrow dataset (``datasets.load_from_disk`` opens it, memory-mapped);
``OUT/<config>.py`` is the config with its training dataset replaced.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.config.lazy import LazyObject

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from mmengine import Config

FOLDER = "dataset"


def save(dataset: object, folder: Path) -> None:
    """Write an Arrow dataset aside, then to ``folder/dataset``.

    Raises:
        UserError: when it is no Arrow dataset.
    """
    from xtuner.utils.files import written_aside

    if not hasattr(dataset, "save_to_disk"):
        raise UserError(
            tr(
                "a {dataset_type} cannot be prepared before training",
                dataset_type=type(dataset).__name__,
            ),
            hint=tr(
                "prepare the parts of a ConcatDataset one by one; text datasets "
                "(process_hf_dataset) can be prepared."
            ),
        )
    with written_aside(folder / FOLDER) as aside:
        dataset.save_to_disk(str(aside))


def from_disk(folder: Path) -> dict[str, Any]:
    """Dataset settings that open the folder."""
    return {
        "type": LazyObject("datasets", "load_from_disk"),
        "dataset_path": str((folder / FOLDER).resolve()),
    }


def write_config(cfg: Config, dataset: Mapping[str, Any], folder: Path) -> Path:
    """Write the config with another training dataset into the folder; gives its path."""
    from xtuner.config import write_config as write

    if "train_dataloader" in cfg:
        cfg.train_dataloader.dataset = dict(dataset)
    if "train_dataset" in cfg:
        cfg.train_dataset = dict(dataset)
    path = folder / f"{Path(cfg.filename).stem}.py"
    write(cfg, path)
    return path


def say_where(samples: int, config: Path) -> None:
    """Tell how many samples there are and how to train on them."""
    print(
        tr(
            "{samples:,} samples prepared. Train on them with: xtuner train {config}",
            samples=samples,
            config=shlex.quote(str(config)),
        )
    )
