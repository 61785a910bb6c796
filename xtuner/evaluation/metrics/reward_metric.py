"""How often a reward model gives the chosen answer more than the rejected one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric

CHOSEN, REJECTED = 0, 1


class RewardMetric(BaseMetric):
    """``accuracy``, ``chosen_score_mean`` and ``rejected_score_mean`` over all pairs."""

    def process(self, data_batch: Mapping[str, Any], data_samples: Sequence[Any]) -> None:
        """Take down the rewards of a batch.

        Args:
            data_batch: of ``preference_collate_fn``.
            data_samples: ``[{'rewards': (B, S)}]`` of the model.
        """
        rewards = data_samples[0]["rewards"].float().cpu()
        labels = torch.as_tensor(data_batch["data"]["labels"]).cpu()
        pairs = zip(rewards[labels == CHOSEN], rewards[labels == REJECTED], strict=True)
        # One result a batch: a packed row has many pairs, and mmengine keeps as many results as
        # the data has rows.
        self.results.append([(float(chosen), float(rejected)) for chosen, rejected in pairs])

    def compute_metrics(self, results: Sequence[list[tuple[float, float]]]) -> dict[str, float]:
        """The metrics of all pairs.

        Args:
            results: (chosen, rejected) rewards of each batch.
        """
        pairs = [pair for batch in results for pair in batch]
        count = max(1, len(pairs))
        return {
            "accuracy": sum(chosen > rejected for chosen, rejected in pairs) / count,
            "chosen_score_mean": sum(chosen for chosen, _ in pairs) / count,
            "rejected_score_mean": sum(rejected for _, rejected in pairs) / count,
        }
