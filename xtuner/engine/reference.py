"""The reference of DPO: set once the initial weights are loaded, its values computed where asked.

The values become columns of the data (``ref_chosen_logps``, ``ref_rejected_logps``) and are kept in
the work dir, in a file whose name is a checksum of all that they depend on: the rows, the weights
of the reference, the model's settings and the versions of the libraries.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from mmengine.dist import all_gather_object, broadcast_object_list, get_rank
from mmengine.runner.base_loop import BaseLoop
from torch import nn
from torch.utils.data import DataLoader, Dataset

from xtuner.checkpoint.data_fingerprint import DataFingerprint
from xtuner.checkpoint.fingerprint import flat_config, package_versions
from xtuner.engine.sharded_batches import ShardedBatches, SizedRows
from xtuner.parallel.unwrap import unwrap_model
from xtuner.utils.constants import REFERENCE_COLUMNS
from xtuner.utils.files import written_aside
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from xtuner.engine.runner.finetune_runner import FinetuneRunner
    from xtuner.model.dpo import DPO

FILE = "reference_{key}.safetensors"
NOT_OF_THE_REFERENCE = ("beta", "label_smoothing", "precompute_reference")
"""Settings of the model that the values do not depend on."""

Columns = dict[str, list[list[float]]]
"""Name of a column -> for each row of a dataset the values of its pairs."""


def has_reference(model: nn.Module) -> TypeGuard[DPO]:
    """Whether a model (not wrapped) is trained against a reference."""
    from xtuner.model.dpo import DPO

    return isinstance(model, DPO)


def prepare_reference(runner: FinetuneRunner) -> None:
    """Add the reference's values to the data, where the model wants them precomputed.

    To be called on every rank, while the weights are those before training.

    Args:
        runner: its loops are built; all their datasets get the columns.
    """
    model = unwrap_model(runner.model)
    if not has_reference(model) or not model.precompute_reference:
        return
    weights = _digest_of_weights(model.reference_weights())
    for loop in (runner._train_loop, runner._val_loop, runner._test_loop):
        if isinstance(loop, BaseLoop):
            loader = loop.dataloader
            extended = _with_reference(runner, loader.dataset, loader, weights)
            # A loader does not let its dataset be set, but looks it up for each epoch.
            object.__setattr__(loader, "dataset", extended)


class WithColumns(Dataset[Any]):
    """A dataset with further columns.

    Args:
        dataset: its rows are mappings.
        columns: name -> a value for each row.
    """

    _dataset: Any

    def __init__(self, dataset: SizedRows, columns: Mapping[str, Sequence[Any]]) -> None:
        self._dataset, self._columns = dataset, columns

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, key: int | str) -> Any:
        """A row by its number, or a column by its name."""
        if isinstance(key, str):
            return self._columns[key] if key in self._columns else self._dataset[key]
        added = {name: values[key] for name, values in self._columns.items()}
        return {**self._dataset[key], **added}

    def __getattr__(self, name: str) -> Any:
        """All else is asked of the dataset."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._dataset, name)


def _with_reference(
    runner: FinetuneRunner, dataset: SizedRows, loader: DataLoader[Any], weights: str
) -> Any:
    """A dataset with the reference's columns; each part of a concatenation has its own."""
    parts = getattr(dataset, "datasets", None)
    if parts is not None:
        joined: Any = copy.copy(dataset)
        joined.datasets = [_with_reference(runner, part, loader, weights) for part in parts]
        return joined
    key, columns = _look_up(runner, dataset, weights)
    if columns is None:
        if get_rank() == 0:
            print(tr("computing the reference's log-probabilities"))
        columns = _compute(runner, dataset, loader)
        if get_rank() == 0:
            _write(Path(runner.work_dir) / FILE.format(key=key), columns)
    return WithColumns(dataset, columns)


def _look_up(
    runner: FinetuneRunner, dataset: SizedRows, weights: str
) -> tuple[str, Columns | None]:
    """The key of a dataset's values, and the values where they are kept; the same on every rank."""
    found: list[Any] = [None]
    if get_rank() == 0:
        key = _key(runner, dataset, weights)
        found = [(key, _read(Path(runner.work_dir) / FILE.format(key=key)))]
    broadcast_object_list(found)
    key, columns = found[0]
    return key, columns


def _key(runner: FinetuneRunner, dataset: SizedRows, weights: str) -> str:
    described = {
        "rows": asdict(DataFingerprint.of(dataset, sampled=None)),
        "weights": weights,
        "model": {
            name: value
            for name, value in flat_config(runner.cfg).items()
            if name.startswith("model.") and name.split(".")[1] not in NOT_OF_THE_REFERENCE
        },
        "dtype": str(getattr(runner.optim_wrapper, "dtype", None)),
        "packages": package_versions(),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _compute(runner: FinetuneRunner, dataset: SizedRows, loader: DataLoader[Any]) -> Columns:
    """The values of all rows, computed by the ranks together."""
    from xtuner.engine.runner.loops import batch_for_loss

    packed = len(dataset) > 0 and "input_ids" in dataset[0]  # several pairs in a row
    batches = ShardedBatches(dataset, loader, batch_size=1 if packed else None)

    def logps(model: nn.Module, batch: Mapping[str, Any]) -> list[float]:
        with runner.autocast():
            values = model(**batch_for_loss(runner, batch), mode="reference")
        return values.float().tolist()

    by_batch = batches.gather(runner.strategy.map_batches(runner.model, batches, logps))
    if not packed:  # a row is a pair: its chosen and its rejected answer
        by_batch = [values[i : i + 2] for values in by_batch for i in range(0, len(values), 2)]
    return {
        name: [values[side::2] for values in by_batch]
        for side, name in enumerate(REFERENCE_COLUMNS)
    }


def _digest_of_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of names and values; of sharded weights that of all shards."""
    digest = hashlib.sha256()
    for name, value in weights:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    shards = dict.fromkeys(all_gather_object(digest.hexdigest()))  # full copies are alike
    return hashlib.sha256(" ".join(shards).encode()).hexdigest()


def _read(file: Path) -> Columns | None:
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        return None
    try:
        with safe_open(str(file), "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in ("pairs", *REFERENCE_COLUMNS)}
    except SafetensorError:  # damaged: computed again
        return None
    counts = tensors.pop("pairs").tolist()
    return {name: list(_split(values.tolist(), counts)) for name, values in tensors.items()}


def _split(values: Sequence[float], counts: Iterable[int]) -> Iterator[list[float]]:
    rest = iter(values)
    for count in counts:
        yield list(islice(rest, count))


def _write(file: Path, columns: Columns) -> None:
    """``pairs`` (rows,) is how many pairs each row has; each column (pairs of all rows,)."""
    from safetensors.torch import save_file

    tensors = {
        name: torch.tensor([value for row in rows for value in row], dtype=torch.float32)
        for name, rows in columns.items()
    }
    counts = [len(row) for row in columns[REFERENCE_COLUMNS[0]]]
    tensors["pairs"] = torch.tensor(counts, dtype=torch.int64)
    with written_aside(file) as aside:
        save_file(tensors, str(aside))
