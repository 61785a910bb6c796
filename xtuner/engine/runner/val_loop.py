"""Validation and test: the loss and perplexity of each dataset, or the metrics of an evaluator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mmengine.runner.loops import TestLoop as _MetricTestLoop
from mmengine.runner.loops import ValLoop as _MetricValLoop
from torch import nn
from torch.utils.data import DataLoader

from xtuner.engine.runner.loops import add_over_ranks, batch_for_loss, batch_on_device
from xtuner.engine.sharded_batches import ShardedBatches
from xtuner.parallel.sequence.groups import get_sequence_parallel_world_size
from xtuner.parallel.unwrap import unwrap_model

if TYPE_CHECKING:
    from mmengine.evaluator import Evaluator

    from xtuner.engine.runner.finetune_runner import FinetuneRunner


Loader: TypeAlias = "DataLoader[Any] | dict[str, Any]"
Metrics: TypeAlias = "Evaluator | dict[str, Any] | Sequence[Any]"


class _EvaluationLoop:
    """What ``ValLoop`` and ``TestLoop`` share; hooks have ``kind`` in the names of methods."""

    kind: Literal["val", "test"]
    runner: FinetuneRunner
    dataloader: Any
    evaluator: Any
    _losses: LossByDataset | None = None

    def run(self) -> dict[str, float]:
        """Evaluate once and return the metrics."""
        runner = self.runner
        runner.call_hook(f"before_{self.kind}")
        runner.call_hook(f"before_{self.kind}_epoch")
        if self.evaluator.metrics:
            metrics = self._evaluate()
        else:
            # The dataset may have got further columns since this loop was built.
            self._losses = self._losses or LossByDataset(self.dataloader)
            metrics = self._losses.measure(runner)
        runner.call_hook(f"after_{self.kind}_epoch", metrics=metrics)
        runner.call_hook(f"after_{self.kind}")
        return metrics

    def _evaluate(self) -> dict[str, float]:
        """Give predictions to the evaluator; the sampler gives every rank as many batches."""
        batches = zip(enumerate(self.dataloader), itertools.repeat(True))
        self.runner.strategy.map_batches(self.runner.model, batches, self._predict)
        metrics: dict[str, float] = self.evaluator.evaluate(len(self.dataloader.dataset))
        return metrics

    def _predict(self, model: nn.Module, numbered: tuple[int, Mapping[str, Any]]) -> None:
        number, batch = numbered
        runner, called = self.runner, {"batch_idx": number, "data_batch": batch}
        runner.call_hook(f"before_{self.kind}_iter", **called)
        with runner.autocast():
            outputs = model(**batch_on_device(runner, batch), mode="predict")
        self.evaluator.process(data_samples=outputs, data_batch=batch)
        runner.call_hook(f"after_{self.kind}_iter", **called, outputs=outputs)


class ValLoop(_EvaluationLoop, _MetricValLoop):
    """Validate. Without an evaluator: loss and perplexity, weighted by tokens.

    The metrics are ``loss`` and ``perplexity``; when the data is a concatenation of several
    datasets also ``<number>/loss`` and ``<number>/perplexity`` of each.

    Args:
        runner: the runner.
        dataloader: the data, or its config.
        evaluator: metrics; none for the loss.
        fp16: as mmengine's, for metrics only.
    """

    kind = "val"

    def __init__(
        self,
        runner: FinetuneRunner,
        dataloader: Loader,
        evaluator: Metrics = (),
        fp16: bool = False,
    ):
        super().__init__(runner, dataloader, evaluator or [], fp16)


class TestLoop(_EvaluationLoop, _MetricTestLoop):
    """Test, as ``ValLoop`` validates; the same arguments."""

    __test__ = False  # pytest: this is not a test
    kind = "test"

    def __init__(
        self,
        runner: FinetuneRunner,
        dataloader: Loader,
        evaluator: Metrics = (),
        fp16: bool = False,
    ):
        super().__init__(runner, dataloader, evaluator or [], fp16)


class LossByDataset:
    """The mean loss over a dataset, and over each one of a concatenation.

    Args:
        dataloader: of the dataset.
    """

    def __init__(self, dataloader: DataLoader[Any]) -> None:
        dataset: Any = dataloader.dataset
        datasets = list(getattr(dataset, "datasets", [])) or [dataset]
        self._batches = [ShardedBatches(each, dataloader) for each in datasets]
        self._num_items: list[dict[str, float]] | None = None

    def measure(self, runner: FinetuneRunner) -> dict[str, float]:
        """Compute loss and perplexity with the model as it is now."""
        if self._num_items is None:
            self._num_items = [self._count(batches, runner) for batches in self._batches]
        losses = [
            self._loss(batches, num_items, runner)
            for batches, num_items in zip(self._batches, self._num_items, strict=True)
        ]
        weights = [max(1, *num_items.values()) for num_items in self._num_items]
        mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True))
        metrics = _named("", mean / sum(weights))
        if len(losses) > 1:
            for number, loss in enumerate(losses):
                metrics |= _named(f"{number}/", loss)
        return metrics

    def _count(self, batches: ShardedBatches, runner: FinetuneRunner) -> dict[str, float]:
        model: Any = unwrap_model(runner.model)
        counts: dict[str, float] = {}
        for batch, counted in batches:
            for name, count in model.num_items(batch["data"]).items():
                counts[name] = counts.get(name, 0) + int(count) * counted
        names = sorted(counts)
        added = add_over_ranks([counts[name] for name in names], runner.device)
        size = get_sequence_parallel_world_size()
        return {name: int(count / size) for name, count in zip(names, added, strict=True)}

    def _loss(
        self, batches: ShardedBatches, num_items: Mapping[str, float], runner: FinetuneRunner
    ) -> float:
        def loss(model: nn.Module, batch: Mapping[str, Any]) -> float:
            with runner.autocast():
                outputs = model(
                    **batch_for_loss(runner, batch), mode="loss", num_items_in_batch=num_items
                )
            return float(outputs["loss"])

        shares = runner.strategy.map_batches(runner.model, batches, loss)
        return add_over_ranks([sum(shares)], runner.device)[0]


def _named(prefix: str, loss: float) -> dict[str, float]:
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {f"{prefix}loss": loss, f"{prefix}perplexity": perplexity}
