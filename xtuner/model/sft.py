"""Supervised fine-tuning: the mean cross-entropy of the tokens that have a label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from xtuner.model.backends.layers import install_tied_embedding
from xtuner.model.base import (
    FinetuneModel,
    packed_cu_seqlens,
    supervised,
)
from xtuner.model.modules.loss import LossConfig, linear_cross_entropy, shift_labels
from xtuner.model.modules.sequence_parallel import forward_sequence_parallel, router_loss_of_rows
from xtuner.parallel.sequence.shard import SequenceShard
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.types import Batch


class SupervisedFinetune(FinetuneModel):
    """Trains a language model to give the labelled tokens.

    Args:
        *args: as ``FinetuneModel``.
        label_smoothing: the share of each target that is spread over the whole vocabulary.
        z_loss: weight of the squared log-sum-exp of the logits; 1e-4 is usual where it is used.
        **kwargs: as ``FinetuneModel``.
    """

    def __init__(
        self, *args: Any, label_smoothing: float = 0.0, z_loss: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.loss_config = LossConfig(label_smoothing, z_loss)
        # whose head is used in every step
        self.backends += install_tied_embedding(self.causal_lm)

    def num_items(self, data: Batch) -> dict[str, int]:
        """``{'tokens': n}``: the supervised tokens of a micro-batch."""
        return {"tokens": int((self._targets(data) != IGNORE_INDEX).sum())}

    def compute_loss(self, data: Batch, num_items_in_batch: Mapping[str, int]) -> dict[str, Tensor]:
        """Compute ``{'loss': scalar}``, the mean over the supervised tokens."""
        return {"loss": self._loss_sum(data) / max(1, num_items_in_batch["tokens"])}

    @staticmethod
    def _targets(data: Batch) -> Tensor:
        """(B, S), the token that each position predicts."""
        return shift_labels(data["labels"], packed_cu_seqlens(data), data.get("attention_mask"))

    def _loss_sum(self, data: Batch) -> Tensor:
        shard = self.shard(data)
        if not self.can_skip_logits(data):
            return self._loss_sum_of_all_logits(data, shard)
        positions, targets = supervised(data, shard)
        hidden = self.hidden_states(data, shard).flatten(0, 1)
        return linear_cross_entropy(
            hidden.index_select(0, positions),
            self.head,
            targets,
            transform=self.logit_transform,
            config=self.loss_config,
        )

    def _loss_sum_of_all_logits(self, data: Batch, shard: SequenceShard) -> Tensor:
        """The loss from all logits, as transformers computes it; with a router's loss, if any."""
        inputs = self.inputs(data)
        outputs: Any = forward_sequence_parallel(self.llm, inputs, shard)
        positions, own = supervised(data, shard)
        loss = self.loss_config(outputs.logits.flatten(0, 1)[positions].float(), own)
        router_loss = getattr(outputs, "aux_loss", None)
        if router_loss is not None:
            targets = self._targets(data)
            if shard.size > 1:  # of this rank's tokens; it is no sum over tokens
                mask = inputs.get("attention_mask")
                router_loss = router_loss_of_rows(
                    self.causal_lm, outputs.router_logits, len(targets), shard, mask
                )
                router_loss = router_loss / shard.size
            weight = getattr(self.causal_lm, "router_aux_loss_coef", 0.0)
            loss = loss + weight * router_loss * (targets != IGNORE_INDEX).sum()
        return loss
