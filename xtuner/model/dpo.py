"""DPO and its kin: the chosen answer made more likely than the rejected one, beside a reference."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from xtuner.model.base import Data
from xtuner.model.loading import build_llm, is_zero3_init_enabled, resize_token_embeddings
from xtuner.model.modules.preference_losses import DPO_LOSSES, MEAN_OVER_TOKENS, Ratios
from xtuner.model.preference import CompletionLogps, PreferenceModel, count_pairs, reward_metrics
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

PairValues = dict[tuple[int, int], tuple[float, float]]
"""(part of the dataset, row) → log-probabilities of its chosen and its rejected answer."""


class DPO(PreferenceModel):
    """Direct preference optimization.

    The reference is the model before training: with an adapter the same model with the adapter
    off; in full training ``ref_llm``, a frozen copy, or what was computed ahead.

    Args:
        llm: as ``FinetuneModel``.
        ref_llm: the reference, as ``llm``; a frozen copy of ``llm`` when None (full training).
        beta: how strongly to keep to the reference.
        loss_type: ``sigmoid``, ``robust``, ``hinge``, ``ipo``, ``kto_pair``, ``sppo_hard`` or
            ``nca_pair``.
        label_smoothing: the share of preferences that may be the wrong way round (``sigmoid``,
            ``robust``).
        precompute_reference: compute the reference's log-probabilities of all pairs before the
            first step, and keep no reference in memory.
        **kwargs: as ``FinetuneModel``.

    Raises:
        UserError: for an unknown ``loss_type``, or a ``label_smoothing`` that it cannot have.
    """

    def __init__(
        self,
        llm: Any,
        ref_llm: Any = None,
        beta: float = 0.1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        precompute_reference: bool = False,
        **kwargs: Any,
    ) -> None:
        _check(loss_type, label_smoothing)
        checkpointing = kwargs.pop("use_activation_checkpointing", True)
        super().__init__(llm, use_activation_checkpointing=False, **kwargs)
        self.beta = beta
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.precompute_reference = precompute_reference
        self.ahead: PairValues = {}
        self.ref_llm = self._reference(ref_llm, llm)
        if checkpointing:  # not in the copy: it has no backward pass
            self.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})

    def _reference(self, ref_llm: Any, llm: Any) -> Any:
        if ref_llm is not None:
            reference = build_llm(ref_llm, full=False)
        elif self.has_adapter or self.precompute_reference:
            return None
        elif is_zero3_init_enabled() and isinstance(llm, Mapping):
            reference = build_llm(llm, full=False)  # a copy would have no weights
            if self.tokenizer is not None:
                resize_token_embeddings(reference, self.tokenizer)
        else:
            reference = copy.deepcopy(self.llm)
        reference.config.use_cache = False
        return reference.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> DPO:
        """Switch dropout and the like on or off; the reference never has any."""
        super().train(mode)
        if self.ref_llm is not None:
            self.ref_llm.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The weights that are trained, without the reference's."""
        prefix = f"{kwargs.get('prefix', '')}ref_llm."
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.startswith(prefix)}

    def num_items(self, data: Mapping[str, Any]) -> dict[str, int]:
        """``{'pairs': P}``."""
        return {"pairs": count_pairs(data)}

    def forward(
        self,
        data: Data,
        data_samples: Any = None,
        mode: str = "loss",
        num_items_in_batch: Mapping[str, int] | None = None,
    ) -> Any:
        """The loss and what is logged beside it; see ``docs/architecture.md``, "Model".

        Args:
            data: a batch of ``preference_collate_fn``.
            data_samples: unused.
            mode: ``loss``; ``tensor`` for the output of the transformers model.
            totals: denominators of the means; the micro-batch's own when None.
        """
        if mode != "loss":
            return self.llm(**self.inputs(data))
        pairs = max(
            1,
            (num_items_in_batch if num_items_in_batch is not None else self.num_items(data))[
                "pairs"
            ],
        )
        reference = self.reference_log_probs(data)
        ratios = self._values(self.answers(data)) - reference
        chosen_and_rejected = Ratios(ratios[::2], ratios[1::2])
        loss = DPO_LOSSES[self.loss_type](chosen_and_rejected, self.beta, self.label_smoothing)
        rewards = self.beta * ratios
        facts = reward_metrics(rewards[::2], rewards[1::2], pairs)
        return self.share(data).divided({"loss": loss.sum() / pairs, **facts})

    def _values(self, answers: CompletionLogps) -> Tensor:
        return answers.means if self.loss_type in MEAN_OVER_TOKENS else answers.log_probs

    @torch.no_grad()
    def reference_log_probs(self, data: Data) -> Tensor:
        """(2 P,) of a batch: looked up, or computed with the reference."""
        if self.ahead:
            parts = data.get("parts") or [0] * len(data["rows"])
            pairs = [self.ahead[key] for key in zip(parts, data["rows"], strict=True)]
            return torch.tensor(pairs, device=data["input_ids"].device).flatten()
        if self.ref_llm is not None:
            return self._values(self.answers(data, self.ref_llm))
        with self._without_adapter():
            return self._values(self.answers(data))

    @contextlib.contextmanager
    def _without_adapter(self) -> Iterator[None]:
        """The model before training: its adapter off (if it has one), and no dropout."""
        training = self.training
        self.eval()
        try:
            with self.llm.disable_adapter() if self.has_adapter else contextlib.nullcontext():
                yield
        finally:
            self.train(training)

    def look_ahead(self, batches: Iterable[Mapping[str, Any]]) -> PairValues:
        """Compute the reference's log-probabilities of pairs, before the first step.

        Args:
            batches: the data of micro-batches, with the ``rows`` they were made of.

        Returns:
            For each pair what ``ahead`` is to hold.
        """
        found: PairValues = {}
        for data in batches:
            values = self.reference_log_probs(dict(data)).tolist()
            parts = data.get("parts") or [0] * len(data["rows"])
            keys = zip(parts, data["rows"], strict=True)
            found.update(zip(keys, zip(values[::2], values[1::2], strict=True), strict=True))
        return found


def _check(loss_type: str, label_smoothing: float) -> None:
    if loss_type not in DPO_LOSSES:
        raise UserError(
            tr("there is no loss {loss_type!r}", loss_type=loss_type),
            hint=", ".join(DPO_LOSSES),
            where=Where(key="model.loss_type"),
        )
    if label_smoothing and loss_type not in ("sigmoid", "robust"):
        raise UserError(
            tr("the loss {loss_type!r} has no label smoothing", loss_type=loss_type),
            where=Where(key="model.label_smoothing"),
        )
    if not 0 <= label_smoothing < 0.5:
        raise UserError(
            tr("label_smoothing must be from 0 to below 0.5"),
            where=Where(key="model.label_smoothing"),
        )
