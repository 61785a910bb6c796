"""Supervised fine-tuning: the mean cross-entropy of the tokens that carry a label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from xtuner.model.base import FinetuneModel
from xtuner.model.modules.loss import cross_entropy_sum, shift_labels
from xtuner.utils.constants import IGNORE_INDEX


class SupervisedFinetune(FinetuneModel):
    """A language model that learns the answers of its data; arguments as ``FinetuneModel``.

    Example:
        >>> model = dict(
        ...     type=SupervisedFinetune,
        ...     use_varlen_attn=True,
        ...     llm=dict(type=AutoModelForCausalLM.from_pretrained,
        ...              pretrained_model_name_or_path="Qwen/Qwen2.5-0.5B"),
        ...     lora=dict(type=LoraConfig, r=64, lora_alpha=16, task_type="CAUSAL_LM"))
    """

    def count_items(self, data: Mapping[str, Any]) -> dict[str, int]:
        """The supervised tokens, under ``tokens``."""
        labels = shift_labels(data["labels"], self.borders(data))
        return {"tokens": int((labels != IGNORE_INDEX).sum())}

    def compute_loss(self, data: Mapping[str, Any], totals: Mapping[str, int]) -> dict[str, Tensor]:
        """The summed cross-entropy of this micro-batch over ``totals['tokens']``."""
        labels = shift_labels(data["labels"], self.borders(data))
        hidden = self.hidden_states(data)
        return {"loss": cross_entropy_sum(hidden, labels, self.head) / totals["tokens"]}
