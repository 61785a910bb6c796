"""The runner of a training: its data are built and examined before the model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from xtuner.config.check.resources import model_json, vocabulary_size
from xtuner.doctor.places import Tracer
from xtuner.engine.runner.embeddings import lacks_embedding
from xtuner.engine.runner.finetune_runner import FinetuneRunner

ID_COLUMNS = ("input_ids", "chosen_ids", "rejected_ids")


class TrainingRunner(FinetuneRunner):
    """A ``FinetuneRunner`` that trains: what is wrong with its data is said before it loads."""

    _train_dataloader: Any

    def build_model(self, model: torch.nn.Module | dict[str, Any]) -> torch.nn.Module:
        """Build the training data, then the model (called by mmengine's ``__init__``)."""
        if isinstance(self._train_dataloader, Mapping):
            settings = self._train_dataloader
            self._train_dataloader = self.build_dataloader(
                settings,
                seed=self.seed,
                diff_rank_seed=self._randomness_cfg.get("diff_rank_seed", False),
            )
            if isinstance(model, Mapping):
                trace = Tracer((self.cfg.get("train_dataloader") or {}).get("dataset"))
                require_embeddings(self._train_dataloader.dataset, model, trace)
        built: torch.nn.Module = super().build_model(model)
        return built


def require_embeddings(dataset: object, model: Mapping[str, Any], trace: Tracer) -> None:
    """Refuse rows with token ids that the base model has no embedding for.

    Args:
        dataset: of the training.
        model: the config's ``model``.
        trace: names rows.

    Raises:
        UserError: with the id, the first row that has it, and what to do.
    """
    llm = model.get("llm")
    name = llm.get("pretrained_model_name_or_path") if isinstance(llm, Mapping) else None
    size = vocabulary_size(model_json(str(name or ""), "config.json"))
    if size is None or model.get("tokenizer") is not None:  # which makes room for its tokens
        return
    for part, own in enumerate(getattr(dataset, "datasets", None) or [dataset]):
        tables = getattr(own, "table", own)
        for row, largest in _largest_ids(tables):
            if largest >= size:
                numbers = tables[row].get("rows") or [row]
                places = trace({"rows": list(numbers), "parts": [part] * len(numbers)})
                raise lacks_embedding(largest, size, places)


def _largest_ids(dataset: Any) -> Iterator[tuple[int, int]]:
    """The row with the largest token id of each block of a ``datasets.Dataset``, and that id."""
    import pyarrow.compute as pc

    if not hasattr(dataset, "with_format"):
        return
    names = [name for name in ID_COLUMNS if name in (dataset.column_names or ())]
    first = 0
    for block in dataset.select_columns(names).with_format("arrow").iter(10_000) if names else ():
        for name in names:
            column = block[name].combine_chunks()
            largest = pc.max(pc.list_flatten(column)).as_py()
            if largest is not None:
                place = pc.index(pc.list_flatten(column), largest).as_py()
                yield first + pc.list_parent_indices(column)[place].as_py(), largest
        first += len(block)
