"""The reference's log-probabilities of all pairs, computed once before a DPO run and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_rank

from xtuner.parallel.sequence.groups import get_data_parallel_rank, get_data_parallel_world_size
from xtuner.utils.files import written_aside
from xtuner.utils.lang import tr

FILE = "reference.safetensors"


def look_ahead(runner: Any) -> None:
    """Fill ``model.ahead`` where a model wants that: from the work dir's file, or anew.

    Must be called while the weights are those before training.
    """
    from xtuner.checkpoint.run_state import bare

    model: Any = bare(runner.model)
    if not getattr(model, "precompute_reference", False):
        return
    file = Path(runner.work_dir) / FILE
    key = _key(runner)
    model.ahead = _read(file, key)
    if model.ahead:
        return
    if get_rank() == 0:
        print(tr("computing the reference's log-probabilities"))
    with runner.autocast():
        mine = model.look_ahead(_batches(runner))
    for part in all_gather_object(mine):
        model.ahead.update(part)
    if get_rank() == 0:
        _write(file, key, model.ahead)


def _batches(runner: Any) -> Iterator[Mapping[str, Any]]:
    """Every row of the data once, this group's share of them."""
    from xtuner.engine.runner.loops import to_device

    loader = runner.train_dataloader
    rows = range(get_data_parallel_rank(), len(loader.dataset), get_data_parallel_world_size())
    for index in rows:
        yield to_device(loader.collate_fn([loader.dataset[index]])["data"], runner.device)


def _key(runner: Any) -> str:
    """What the numbers depend on: data and model."""
    rows = getattr(runner.train_dataloader.dataset, "_fingerprint", "")
    text = f"{rows}{runner.fingerprints['data']}{runner.cfg.get('model')}"
    return hashlib.sha256(text.encode()).hexdigest()


def _read(file: Path, key: str) -> dict[tuple[int, int], tuple[float, float]]:
    from safetensors import safe_open

    if not file.exists():
        return {}
    with safe_open(str(file), "pt") as opened:
        if (opened.metadata() or {}).get("key") != key:
            return {}
        pairs, values = opened.get_tensor("pairs"), opened.get_tensor("log_probs")
    keys = [(int(part), int(row)) for part, row in pairs.tolist()]
    return dict(zip(keys, [(a, b) for a, b in values.tolist()], strict=True))


def _write(file: Path, key: str, ahead: Mapping[tuple[int, int], tuple[float, float]]) -> None:
    from safetensors.torch import save_file

    tensors = {
        "pairs": torch.tensor(list(ahead), dtype=torch.int64),
        "log_probs": torch.tensor(list(ahead.values()), dtype=torch.float32),
    }
    with written_aside(file) as aside:
        save_file(tensors, str(aside), metadata={"key": key})
