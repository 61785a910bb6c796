"""What DPO and ORPO shard: the log-probabilities of answers that stand in pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from xtuner.model.base import (
    FinetuneModel,
    packed_cu_seqlens,
    supervised,
)
from xtuner.model.modules.loss import LogitTransform, token_log_probs
from xtuner.model.modules.sequence_parallel import forward_sequence_parallel
from xtuner.parallel.sequence.shard import SequenceShard
from xtuner.utils.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CompletionLogps(NamedTuple):
    """(2 P,) of P pairs, chosen and rejected in turns."""

    log_probs: Tensor
    """Sums over the labelled tokens, float32."""
    tokens: Tensor
    """How many these are."""

    @property
    def means(self) -> Tensor:
        return self.log_probs / self.tokens.clamp(min=1)


class PreferenceModel(FinetuneModel):
    """A model trained on batches of ``preference_collate_fn``; arguments as ``FinetuneModel``."""

    def completion_logps(self, data: Batch, llm: PreTrainedModel | None = None) -> CompletionLogps:
        """Log-probabilities of the answers of a batch, never with all logits at once.

        Args:
            data: ``input_ids`` and ``labels`` (2 P, S), or one packed row of 2 P samples.
            llm: a transformers model instead of the one that is trained.

        Returns:
            The same on all ranks that share the rows; a loss computed from it must be scaled by
            ``scale_loss``.
        """
        cu_seqlens, shard = packed_cu_seqlens(data), self.shard(data)
        positions, targets = supervised(data, shard)
        if cu_seqlens is None:
            samples = positions // shard.tokens
        else:
            ends = cu_seqlens[1:].to(positions.dtype)
            samples = torch.bucketize(positions + shard.start, ends, right=True)
        log_probs = self._token_log_probs(data, shard, positions, targets, llm)
        empty = log_probs.new_zeros(2 * count_pairs(data))
        ones = torch.ones_like(log_probs)
        return CompletionLogps(
            shard.add(empty.index_add(0, samples, log_probs)),
            shard.add(empty.index_add(0, samples, ones)).detach(),
        )

    def _token_log_probs(
        self,
        data: Batch,
        shard: SequenceShard,
        positions: Tensor,
        targets: Tensor,
        llm: PreTrainedModel | None,
    ) -> Tensor:
        """(N,) of the labelled tokens of this rank."""
        causal_lm = self.causal_lm if llm is None else llm
        if not self.can_skip_logits(data):
            logits = forward_sequence_parallel(causal_lm, self.inputs(data), shard).logits.flatten(
                0, 1
            )
            head: Any = torch.nn.Identity()
            head.out_features = logits.shape[-1]
            return token_log_probs(logits[positions], head, targets, LogitTransform())
        hidden = forward_sequence_parallel(
            causal_lm.base_model, self.inputs(data), shard
        ).last_hidden_state
        head = causal_lm.get_output_embeddings()
        return token_log_probs(
            hidden.flatten(0, 1).index_select(0, positions), head, targets, self.logit_transform
        )


def count_pairs(data: Batch) -> int:
    """P: the pairs of a micro-batch."""
    cu_seqlens = packed_cu_seqlens(data)
    samples = len(data["input_ids"]) if cu_seqlens is None else len(cu_seqlens) - 1
    return samples // 2


def reward_metrics(chosen: Tensor, rejected: Tensor, pairs: int) -> dict[str, Tensor]:
    """What is logged of rewards (P,): shares of means over ``pairs``, which add up."""
    chosen, rejected = chosen.detach().float(), rejected.detach().float()
    metrics = {
        "chosen_rewards": chosen,
        "rejected_rewards": rejected,
        "reward_acc": (chosen > rejected).float(),
        "reward_margin": chosen - rejected,
    }
    return {name: values.sum() / max(1, pairs) for name, values in metrics.items()}
