"""Reward models: a number for an answer, higher for the one that people prefer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.model.base import FinetuneModel, rows_for_gpu
from xtuner.model.modules.preference_losses import PENALTIES, REWARD_LOSSES
from xtuner.model.preference import reward_metrics
from xtuner.model.reward_classes import HEAD, HUB_HEAD, hub_settings
from xtuner.parallel.sequence.shard import SequenceShard
from xtuner.utils.constants import CHOSEN, REJECTED
from xtuner.utils.errors import UserError, Where
from xtuner.utils.files import written_aside
from xtuner.utils.lang import tr
from xtuner.utils.types import Batch


def find_rewarded(data: Batch) -> Batch:
    """The field ``rewarded`` of a batch."""
    labels = data["labels"].flatten()
    return {"rewarded": [(labels == side).nonzero().flatten() for side in (CHOSEN, REJECTED)]}


class RewardModel(FinetuneModel):
    """A language model whose last hidden state at the reward token becomes a number.

    Args:
        *args: as ``FinetuneModel``; ``llm`` may be an ``AutoModel`` or an ``AutoModelForCausalLM``.
        reward_token_id: kept from v0.1: the dataset puts the token there, and its label says where.
        loss_type: ``ranking`` or ``focal``.
        penalty_type: ``log_barrier``, ``L2`` or ``none``: keeps rewards small.
        penalty_weight: its weight.
        **kwargs: as ``FinetuneModel``.

    Raises:
        UserError: for a loss or a penalty that does not exist.
    """

    def __init__(
        self,
        *args: Any,
        reward_token_id: int | None = None,
        loss_type: str = "ranking",
        penalty_type: str = "log_barrier",
        penalty_weight: float = 0.01,
        **kwargs: Any,
    ) -> None:
        for key, name, known in (
            ("loss_type", loss_type, REWARD_LOSSES),
            ("penalty_type", penalty_type, PENALTIES),
        ):
            if name not in known:
                raise UserError(
                    tr("there is no {key} {name!r}", key=key, name=name),
                    hint=", ".join(known),
                    where=Where(key=f"model.{key}"),
                )
        super().__init__(*args, **kwargs)
        self._freeze_unused_head()
        self.reward_token_id = reward_token_id
        self.loss_type = loss_type
        self.penalty_type = penalty_type
        self.penalty_weight = penalty_weight
        width = self.causal_lm.config.get_text_config().hidden_size
        # Small, so that all answers begin near a reward of 0 (Stiennon et al. 2020).
        self.v_head = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.v_head.weight, std=1 / (width + 1) ** 0.5)

    def _freeze_unused_head(self) -> None:
        """Of an ``AutoModelForCausalLM`` the head has no gradient, which DDP would wait for."""
        head = self.causal_lm.get_output_embeddings()
        if head is not None and head.weight is not self.causal_lm.get_input_embeddings().weight:
            head.requires_grad_(False)

    def can_skip_logits(self, data: Batch) -> bool:
        """Always: rewards are computed from hidden states, an ``AutoModel`` has no logits."""
        return True

    def prepare_batch(self, data: Batch, device: torch.device) -> Batch:
        """As ``FinetuneModel``."""
        rows = rows_for_gpu(self, data, device)
        return data if rows is None else {**rows, **find_rewarded(rows)}

    def num_items(self, data: Batch) -> dict[str, int]:
        """``{'pairs': P}``."""
        return {"pairs": int((data["labels"] == CHOSEN).sum())}

    def compute_loss(self, data: Batch, num_items_in_batch: Mapping[str, int]) -> dict[str, Tensor]:
        """Compute the loss and what is logged beside it.

        Args:
            data: a batch of ``preference_collate_fn``: labels are 0 (chosen) and 1 (rejected) at
                reward tokens, ``IGNORE_INDEX`` elsewhere.
            num_items_in_batch: denominators of the means.
        """
        pairs = max(1, num_items_in_batch["pairs"])
        chosen, rejected = self._rewards(data)
        loss = REWARD_LOSSES[self.loss_type](chosen, rejected).sum() / pairs
        penalty = PENALTIES[self.penalty_type](torch.cat([chosen, rejected])).sum() / (2 * pairs)
        outputs = {
            "loss": loss + self.penalty_weight * penalty,
            **reward_metrics(chosen, rejected, pairs),
        }
        return self.shard(data).scale_loss(outputs)

    def compute_outputs(self, data: Batch) -> Tensor:
        """The rewards (B, S) of all positions."""
        rewards: Tensor = self.v_head(self._hidden(data)).squeeze(-1)
        return rewards

    def predict(self, data: Batch) -> dict[str, Tensor]:
        """Compute ``{'rewards': (B, S)}``."""
        return {"rewards": self.compute_outputs(data)}

    def _rewards(self, data: Batch) -> tuple[Tensor, Tensor]:
        """Those of all chosen and of all rejected answers, in the order of their tokens."""
        shard = self.shard(data)
        hidden = self._hidden(data, shard)
        if "rewarded" in data:  # in whole rows, found on the CPU
            chosen, rejected = (
                self.v_head(hidden.flatten(0, 1).index_select(0, positions)).squeeze(-1).float()
                for positions in data["rewarded"]
            )
            return chosen, rejected
        sides = []
        for side in (CHOSEN, REJECTED):
            marks = data["labels"] == side
            own = shard.shard(marks, False)
            rewards = self.v_head(hidden[own]).squeeze(-1).float()
            positions = shard.shard(_numbered(marks))[own]
            sides.append(rewards.new_zeros(int(marks.sum())).index_add(0, positions, rewards))
        chosen, rejected = shard.add(torch.cat(sides)).split([len(side) for side in sides])
        return chosen, rejected

    def _hidden(self, data: Batch, shard: SequenceShard | None = None) -> Tensor:
        """(B, S, H) in the head's number format."""
        hidden: Tensor = self.hidden_states(data, shard)
        return hidden.to(self.v_head.weight.dtype)

    def to_hf(
        self,
        save_dir: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        safe_serialization: bool = True,
        max_shard_size: int | str = "2GB",
    ) -> None:
        """Write a model, or an adapter, for ``AutoModelForSequenceClassification``, head included.

        A whole InternLM2 is written as the hub's ``InternLM2ForRewardModel``.

        Args:
            save_dir: the folder.
            dtype: number format of the weights; as they are when None.
            safe_serialization: kept from v0.1.
            max_shard_size: of a file of a whole model.
        """
        with written_aside(save_dir) as aside:
            if self.has_adapter:
                self._write_adapter(aside, dtype)
            else:
                self._write_classifier(aside, dtype, max_shard_size)
            beside: Any = self.processor or self.tokenizer
            if beside is not None:
                beside.save_pretrained(aside)

    def _write_adapter(self, aside: Path, dtype: torch.dtype | None) -> None:
        import json

        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        own = self.classifier_adapter(get_peft_model_state_dict(self.llm), self.v_head.weight)
        weights = {name: _plain(value, dtype) for name, value in own.items()}
        aside.mkdir(parents=True, exist_ok=True)
        self.llm.peft_config[self.llm.active_adapter].save_pretrained(str(aside))
        file = aside / "adapter_config.json"
        settings = json.loads(file.read_text("utf-8"))
        kept = set(settings.get("modules_to_save") or ()) | {HEAD}
        settings |= {"task_type": "SEQ_CLS", "modules_to_save": sorted(kept)}
        file.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        save_file(weights, aside / "adapter_model.safetensors", metadata={"format": "pt"})

    def classifier_adapter(self, weights: Mapping[str, Tensor], head: Tensor) -> dict[str, Tensor]:
        """The tensors of an adapter of ``AutoModelForSequenceClassification``.

        Args:
            weights: the adapter's, by peft's names.
            head: the weight of the head.
        """
        body = "base_model.model."
        inside = f"{body}{self._body_prefix()}"
        named = {
            name if name.startswith(inside) else name.replace(body, inside, 1): value
            for name, value in weights.items()
        }
        return named | {f"{body}{HEAD}.weight": head}

    def _write_classifier(
        self, aside: Path, dtype: torch.dtype | None, max_shard_size: int | str
    ) -> None:
        import copy

        from xtuner.model.transformers_models.auto import AutoModelForSequenceClassification

        config = copy.deepcopy(self.llm.config)
        config.num_labels = 1
        config._attn_implementation = "eager"  # nothing is computed
        text = config.get_text_config()
        if self.tokenizer is not None and text.pad_token_id is None:
            text.pad_token_id = self.tokenizer.pad_token_id
        settings = hub_settings(config.model_type, self.reward_token_id)
        config.update(settings)
        with torch.device("meta"):
            classifier: Any = AutoModelForSequenceClassification.from_config(
                config, trust_remote_code=False
            )
        prefix = f"{classifier.base_model_prefix}."
        inner = self.llm.base_model.state_dict()
        weights = {f"{prefix}{name}": _plain(value, dtype) for name, value in inner.items()}
        head = HUB_HEAD if settings else HEAD
        weights[f"{head}.weight"] = _plain(self.v_head.weight, dtype)
        classifier.load_state_dict(weights, assign=True)
        classifier.save_pretrained(aside, max_shard_size=max_shard_size)

    def _body_prefix(self) -> str:
        """How the body is called in a model with a head: ``model.`` in most architectures."""
        return f"{self.causal_lm.base_model_prefix}."


def _numbered(marks: Tensor) -> Tensor:
    """(B, S) → at each mark how many there are before it."""
    return marks.flatten().cumsum(0).view_as(marks) - 1


def _plain(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    value = value.detach()
    if dtype is not None and value.is_floating_point():
        value = value.to(dtype)
    return value.contiguous().cpu() if not value.is_meta else value
