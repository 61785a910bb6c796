"""Validation and test: the loss and perplexity of each dataset, or the metrics of an evaluator."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.runner.loops import TestLoop as _MetricTestLoop
from mmengine.runner.loops import ValLoop as _MetricValLoop
from torch.utils.data import DataLoader

from xtuner.checkpoint.run_state import bare
from xtuner.engine.runner.loops import add_over_ranks, to_device
from xtuner.parallel.sequence.groups import (
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_sequence_parallel_world_size,
)

Part = tuple[DataLoader, list[bool]]


class ValLoop(_MetricValLoop):
    """Validate. Without an evaluator: loss and perplexity, weighted by tokens.

    The metrics are ``loss`` and ``perplexity``; when the data is a concatenation of several
    datasets also ``<number>/loss`` and ``<number>/perplexity`` of each.

    Args:
        runner: the runner.
        dataloader: the data, or its config.
        evaluator: metrics; none for the loss.
        fp16: as mmengine's, for metrics only.
    """

    def __init__(self, runner: Any, dataloader: Any, evaluator: Any = (), fp16: bool = False):
        super().__init__(runner, dataloader, evaluator or [], fp16)
        self._parts = LossParts(self.dataloader)

    def run(self) -> dict[str, float]:
        """Validate once and return the metrics."""
        if self.evaluator.metrics:
            return super().run()
        runner = self.runner
        runner.call_hook("before_val")
        runner.call_hook("before_val_epoch")
        metrics = self._parts.measure(runner)
        runner.call_hook("after_val_epoch", metrics=metrics)
        runner.call_hook("after_val")
        return metrics

    @torch.no_grad()
    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Give a batch to the model and what it says to the metrics."""
        _measure_batch(self, "val", idx, data_batch)


class TestLoop(_MetricTestLoop):
    """Test, as ``ValLoop`` validates."""

    __test__ = False  # pytest: this is not a test

    def __init__(self, runner: Any, dataloader: Any, evaluator: Any = (), fp16: bool = False):
        super().__init__(runner, dataloader, evaluator or [], fp16)
        self._parts = LossParts(self.dataloader)

    def run(self) -> dict[str, float]:
        """Test once and return the metrics."""
        if self.evaluator.metrics:
            return super().run()
        runner = self.runner
        runner.call_hook("before_test")
        runner.call_hook("before_test_epoch")
        metrics = self._parts.measure(runner)
        runner.call_hook("after_test_epoch", metrics=metrics)
        runner.call_hook("after_test")
        return metrics

    @torch.no_grad()
    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Give a batch to the model and what it says to the metrics."""
        _measure_batch(self, "test", idx, data_batch)


def _measure_batch(loop: Any, kind: str, idx: int, data_batch: Any) -> None:
    """mmengine's step of a metric loop, for a model in any wrapper and on any device."""
    runner = loop.runner
    runner.call_hook(f"before_{kind}_iter", batch_idx=idx, data_batch=data_batch)
    with runner.autocast():
        outputs = bare(runner.model)(**to_device(data_batch, runner.device), mode="predict")
    loop.evaluator.process(data_samples=outputs, data_batch=data_batch)
    runner.call_hook(f"after_{kind}_iter", batch_idx=idx, data_batch=data_batch, outputs=outputs)


class LossParts:
    """The mean loss over each part of a dataset.

    Batches are cut from the data in order and dealt out to the ranks (ranks that share rows get the
    same), so that the result does not depend on how many there are. A rank without a batch of its
    own computes one that does not count, as some ways to distribute a model need every rank in
    every forward.
    """

    def __init__(self, dataloader: DataLoader) -> None:
        whole: Any = dataloader.dataset
        parts = list(getattr(whole, "datasets", [])) or [whole]
        self._parts = [_dealt(part, dataloader) for part in parts]
        self._totals: list[dict[str, float]] | None = None

    @torch.no_grad()
    def measure(self, runner: Any) -> dict[str, float]:
        """Compute loss and perplexity of all parts with the model as it is now."""
        model: Any = bare(runner.model)
        runner.model.eval()
        if self._totals is None:
            self._totals = [self._count(model, part, runner) for part in self._parts]
        losses = [
            self._loss(model, part, num_items_in_batch, runner)
            for part, num_items_in_batch in zip(self._parts, self._totals, strict=True)
        ]
        weights = [max(num_items_in_batch.values()) for num_items_in_batch in self._totals]
        mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True))
        metrics = _named("", mean / sum(weights))
        if len(losses) > 1:
            for number, loss in enumerate(losses):
                metrics |= _named(f"{number}/", loss)
        return metrics

    def _count(self, model: Any, part: Part, runner: Any) -> dict[str, float]:
        counts: dict[str, float] = {}
        for batch, counted in zip(*part, strict=True):
            for name, count in model.num_items(batch["data"]).items():
                counts[name] = counts.get(name, 0) + int(count) * counted
        names = sorted(counts)
        added = add_over_ranks([counts[name] for name in names], runner.device)
        size = get_sequence_parallel_world_size()
        return {name: max(1, int(count / size)) for name, count in zip(names, added, strict=True)}

    def _loss(
        self, model: Any, part: Part, num_items_in_batch: Mapping[str, float], runner: Any
    ) -> float:
        share = 0.0
        for batch, counted in zip(*part, strict=True):
            with runner.autocast():
                outputs = model(
                    **to_device(batch, runner.device),
                    mode="loss",
                    num_items_in_batch=num_items_in_batch,
                )
            share += float(outputs["loss"]) * counted
        return add_over_ranks([share], runner.device)[0]


def _dealt(dataset: Any, like: DataLoader) -> tuple[DataLoader, list[bool]]:
    """A loader of this group's batches of ``dataset``, in order, and which of them count."""
    size = like.batch_size or 1
    starts = range(0, len(dataset), size)
    batches = [list(range(start, min(start + size, len(dataset)))) for start in starts]
    ranks = get_data_parallel_world_size()
    rounds = math.ceil(len(batches) / ranks)
    mine = [get_data_parallel_rank() + turn * ranks for turn in range(rounds)]
    loader = DataLoader(
        dataset,
        batch_sampler=[batches[number] if number < len(batches) else batches[0] for number in mine],
        collate_fn=like.collate_fn,
        num_workers=like.num_workers,
        generator=torch.Generator(),  # so that validating leaves the global random state alone
    )
    return loader, [number < len(batches) for number in mine]


def _named(prefix: str, loss: float) -> dict[str, float]:
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {f"{prefix}loss": loss, f"{prefix}perplexity": perplexity}
