"""ORPO: supervised fine-tuning with a penalty on the odds of the rejected answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from xtuner.model.base import packed_cu_seqlens
from xtuner.model.modules.loss import shift_labels
from xtuner.model.modules.preference_losses import log_odds_ratio
from xtuner.model.preference import PreferenceModel, count_pairs, reward_metrics
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.types import Batch


class ORPO(PreferenceModel):
    """Odds-ratio preference optimization (Hong et al. 2024).

    Args:
        *args: as ``FinetuneModel``.
        beta: weight of the odds ratio beside the loss of the chosen answer (lambda in the paper).
        **kwargs: as ``FinetuneModel``.
    """

    def __init__(self, *args: Any, beta: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beta = beta

    def num_items(self, data: Batch) -> dict[str, int]:
        """``{'pairs': P, 'tokens': labelled tokens of the chosen answers}``."""
        return {"pairs": count_pairs(data), "tokens": _chosen_tokens(data)}

    def compute_loss(self, data: Batch, num_items_in_batch: Mapping[str, int]) -> dict[str, Tensor]:
        """Compute the loss and what is logged beside it."""
        pairs, tokens = max(1, num_items_in_batch["pairs"]), max(1, num_items_in_batch["tokens"])
        logps = self.completion_logps(data)
        chosen, rejected = logps.means[::2], logps.means[1::2]
        likelihood = -logps.log_probs[::2].sum() / tokens
        odds = log_odds_ratio(chosen, rejected).sum() / pairs
        metrics = reward_metrics(self.beta * chosen, self.beta * rejected, pairs)
        outputs = {
            "loss": likelihood - self.beta * odds,
            "nll_loss": likelihood.detach(),
            "log_odds": odds.detach(),
            **metrics,
        }
        return self.shard(data).scale_loss(outputs)


def _chosen_tokens(data: Batch) -> int:
    """Labelled tokens of every second sample, as many as the loss has."""
    cu_seqlens = packed_cu_seqlens(data)
    trained = shift_labels(data["labels"], cu_seqlens, data.get("attention_mask")) != IGNORE_INDEX
    if cu_seqlens is None:
        return int(trained[::2].sum())
    marks = cu_seqlens.tolist()
    spans = zip(marks[:-1:2], marks[1::2], strict=True)
    return sum(int(trained[0, start:stop].sum()) for start, stop in spans)
