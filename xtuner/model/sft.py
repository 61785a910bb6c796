"""Supervised fine-tuning: the mean cross-entropy of the tokens that have a label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from xtuner.model.backends.cpu import tied_embedding
from xtuner.model.base import Data, FinetuneModel, packed_cu_seqlens
from xtuner.model.modules.loss import LossConfig, linear_cross_entropy, shift_labels
from xtuner.model.modules.sequence_parallel import forward_sequence_parallel, router_loss_of_rows
from xtuner.parallel.sequence.shard import SequenceShard
from xtuner.utils.constants import IGNORE_INDEX


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
        self.terms = LossConfig(label_smoothing, z_loss)
        tied_embedding.speed_up(self.causal_lm)

    def num_items(self, data: Mapping[str, Any]) -> dict[str, int]:
        """``{'tokens': n}``: the supervised tokens of a micro-batch."""
        targets = shift_labels(data["labels"], packed_cu_seqlens(data), data.get("attention_mask"))
        return {"tokens": int((targets != IGNORE_INDEX).sum())}

    def forward(
        self,
        data: Data,
        data_samples: Any = None,
        mode: str = "loss",
        num_items_in_batch: Mapping[str, int] | None = None,
    ) -> Any:
        """Compute the loss, or the logits.

        Args:
            data: a batch as ``default_collate_fn`` makes it: ``input_ids`` and ``labels`` (B, S).
            data_samples: unused; mmengine hands it over.
            mode: ``loss``; ``predict`` for ``[{'logits': (B, S, V)}]``; ``tensor`` for the output
                of the transformers model.
            totals: denominators of the mean; the micro-batch's own when None.

        Returns:
            With ``loss``: ``{'loss': scalar}``, the share of the mean over ``totals``.

        Raises:
            NotImplementedError: for another mode.
        """
        if mode == "loss":
            num_items_in_batch = (
                num_items_in_batch if num_items_in_batch is not None else self.num_items(data)
            )
            return {"loss": self._loss_sum(data) / max(1, num_items_in_batch["tokens"])}
        if mode == "predict":
            return [{"logits": self.llm(**self.inputs(data)).logits}]
        if mode == "tensor":
            return self.llm(**self.inputs(data))
        raise NotImplementedError(f"mode {mode!r}; there are: loss, predict, tensor")

    def _loss_sum(self, data: Data) -> Tensor:
        share = self.share(data)
        targets = shift_labels(data["labels"], packed_cu_seqlens(data), data.get("attention_mask"))
        if not self.can_skip_logits(data):
            return self._plain_loss_sum(data, targets, share)
        targets = share.cut(targets, IGNORE_INDEX).flatten()
        supervised = (targets != IGNORE_INDEX).nonzero().flatten()
        hidden = self.hidden_states(data, share).last_hidden_state.flatten(0, 1)
        return linear_cross_entropy(
            hidden[supervised], self.head, targets[supervised], rule=self.rule, terms=self.terms
        )

    def _plain_loss_sum(self, data: Data, targets: Tensor, share: SequenceShard) -> Tensor:
        """The loss from all logits, as transformers computes it; with a router's loss, if any."""
        inputs = self.inputs(data)
        outputs = forward_sequence_parallel(self.llm, inputs, share)
        own = share.cut(targets, IGNORE_INDEX).flatten()
        supervised = own != IGNORE_INDEX
        loss = self.terms(outputs.logits.flatten(0, 1)[supervised].float(), own[supervised])
        router_loss = getattr(outputs, "aux_loss", None)
        if router_loss is not None:
            if share.size > 1:  # of a stretch; it is no sum over tokens
                mask = inputs.get("attention_mask")
                router_loss = router_loss_of_rows(
                    self.causal_lm, outputs.router_logits, len(targets), share, mask
                )
                router_loss = router_loss / share.size
            weight = getattr(self.causal_lm, "router_aux_loss_coef", 0.0)
            loss = loss + weight * router_loss * (targets != IGNORE_INDEX).sum()
        return loss
