"""DPO and related losses: the chosen answer becomes more likely, measured against a reference."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xtuner.model.activation_checkpointing import enable_activation_checkpointing
from xtuner.model.loading import build_llm, is_zero3_init_enabled, resize_token_embeddings
from xtuner.model.modules.preference_losses import DPO_LOSSES, MEAN_OVER_TOKENS, Ratios
from xtuner.model.preference import (
    CompletionLogps,
    PreferenceModel,
    count_pairs,
    reward_metrics,
)
from xtuner.utils.constants import REFERENCE_COLUMNS
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFERENCE_ADAPTER = "reference"
ROUNDING = 0.05
"""In nats, for a token in bf16: over an answer it grows with the root of the log-probability."""

logger = logging.getLogger(__name__)


class DPO(PreferenceModel):
    """Direct preference optimization (Rafailov et al. 2023).

    The reference is the model before training: the same model without its adapter, or with a frozen
    copy of the adapter where that does something before the first step (``peft_model``,
    ``load_from``, PiSSA); in full training ``ref_llm``, a frozen copy, or values that were
    precomputed.

    Args:
        llm: as ``FinetuneModel``.
        ref_llm: the reference, as ``llm``; a frozen copy of ``llm`` when None (full training).
        beta: how strongly to keep to the reference.
        loss_type: ``sigmoid``, ``robust``, ``hinge``, ``ipo``, ``kto_pair``, ``sppo_hard`` or
            ``nca_pair``.
        label_smoothing: the share of pairs whose labels may be swapped (``sigmoid``,
            ``robust``).
        precompute_reference: take the reference's log-probabilities from the batch, where
            ``engine.reference`` puts them before the first step; no reference is kept in memory.
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
        self.ref_llm = self._reference(ref_llm, llm)
        self._ref_is_copy = self.ref_llm is not None and ref_llm is None
        self._compares_start = False
        trained_before = kwargs.get("peft_model") is not None
        if self.has_adapter and (trained_before or not _is_identity(self.llm)):
            self.keep_initial_adapter()
        # not in the copy: it has no backward pass
        enable_activation_checkpointing(self.causal_lm, checkpointing)

    def _reference(self, ref_llm: Any, llm: PreTrainedModel) -> Any:
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

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """The weights that are trained, without the reference's."""
        prefix = f"{kwargs.get('prefix', '')}ref_llm."
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.startswith(prefix)}

    def num_items(self, data: Batch) -> dict[str, int]:
        """``{'pairs': P}``."""
        return {"pairs": count_pairs(data)}

    def forward(
        self,
        data: Batch,
        data_samples: object = None,
        mode: str = "loss",
        num_items_in_batch: Mapping[str, int] | None = None,
    ) -> Any:
        """As ``FinetuneModel``; with ``mode='reference'`` compute ``reference_logps``."""
        if mode == "reference":
            return self.reference_logps(data)
        return super().forward(data, data_samples, mode, num_items_in_batch)

    def compute_loss(self, data: Batch, num_items_in_batch: Mapping[str, int]) -> dict[str, Tensor]:
        """Compute the loss and what is logged beside it."""
        pairs = max(1, num_items_in_batch["pairs"])
        reference = (
            self._precomputed(data) if self.precompute_reference else self.reference_logps(data)
        )
        if self._compares_start:
            self._compare_start(data, reference)
        ratios = self._values(self.completion_logps(data)) - reference
        chosen_and_rejected = Ratios(ratios[::2], ratios[1::2])
        loss = DPO_LOSSES[self.loss_type](chosen_and_rejected, self.beta, self.label_smoothing)
        rewards = self.beta * ratios
        metrics = reward_metrics(rewards[::2], rewards[1::2], pairs)
        return self.shard(data).scale_loss({"loss": loss.sum() / pairs, **metrics})

    def compare_start(self) -> None:
        """Let the next loss compare model and reference, which are the same before training.

        A ``ref_llm`` that the config names is another model.
        """
        self._compares_start = self.ref_llm is None or self._ref_is_copy

    @torch.no_grad()
    def _compare_start(self, data: Batch, reference: Tensor) -> None:
        """Warn where the loss of the first step would not be that of equal models: ln 2."""
        self._compares_start = False
        training = self.training
        self.eval()  # dropout would make a difference
        try:
            gap = (self._values(self.completion_logps(data)) - reference).abs().mean().item()
        finally:
            self.train(training)
        if not gap <= ROUNDING * (1 + reference.abs().mean().item()) ** 0.5:
            logger.warning(
                tr(
                    "The reference is not the model before training: their log-probabilities of "
                    "the first answers are %.3g apart. Please report this; rewards and losses "
                    "are measured against another model."
                ),
                gap,
            )

    def _values(self, logps: CompletionLogps) -> Tensor:
        return logps.means if self.loss_type in MEAN_OVER_TOKENS else logps.log_probs

    def _precomputed(self, data: Batch) -> Tensor:
        """(2 P,) float32, chosen and rejected in turns.

        The batch has lists, not tensors, which FSDP would cast to the dtype of the computation.

        Raises:
            RuntimeError: when the batch has none: the model itself is trained and no reference.
        """
        columns = [data.get(name) for name in REFERENCE_COLUMNS]
        if None in columns:
            raise RuntimeError(
                f"precompute_reference=True, but the batch has no {', '.join(REFERENCE_COLUMNS)}"
            )
        return torch.tensor(columns, device=data["input_ids"].device).T.flatten()

    @torch.no_grad()
    def reference_logps(self, data: Batch) -> Tensor:
        """Compute log-probabilities with the reference.

        Args:
            data: a batch of ``preference_collate_fn``.

        Returns:
            (2 P,) sums over the labelled tokens, or means where the loss takes these.
        """
        if self.ref_llm is not None:
            return self._values(self.completion_logps(data, self.ref_llm))
        with self._as_reference():
            return self._values(self.completion_logps(data))

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[None]:
        """The model before training: without its adapter or with the initial one, no dropout."""
        training = self.training
        self.eval()
        try:
            if not self.has_adapter:
                yield
            elif REFERENCE_ADAPTER not in self.llm.peft_config:
                with self.llm.disable_adapter():
                    yield
            else:
                trained = self.llm.active_adapter
                self.llm.set_adapter(REFERENCE_ADAPTER)
                try:
                    yield
                finally:
                    self.llm.set_adapter(trained)
        finally:
            self.train(training)

    def keep_initial_adapter(self) -> None:
        """Add a frozen copy of the adapter, which is the reference from now on.

        To be called before the model is distributed, when the adapter will not be that of a new
        LoRA, which does nothing before the first step.

        Raises:
            UserError: when peft has no second adapter of this kind.
        """
        has_reference = self.ref_llm is not None or not self.has_adapter
        if has_reference or REFERENCE_ADAPTER in self.llm.peft_config:
            return
        trained = self.llm.active_adapter
        config = copy.deepcopy(self.llm.peft_config[trained])
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # PiSSA and others change the base a second time
        try:
            self.llm.add_adapter(REFERENCE_ADAPTER, config)
        except (ValueError, NotImplementedError) as error:
            raise UserError(
                tr("the reference of DPO needs a second adapter: {error}", error=error),
                hint=tr(
                    "merge the adapter into the base model ('xtuner convert merge') and "
                    "train a new one on it."
                ),
                where=Where(key="model.peft_model"),
            ) from error
        self.llm.set_adapter(trained)
        self.sync_reference()

    @torch.no_grad()
    def sync_reference(self) -> None:
        """Set the reference to the model as it is now; to be called when new weights are loaded.

        A ``ref_llm`` that the config names stays as it is. Works on weights that FSDP or ZeRO have
        distributed.
        """
        if self._ref_is_copy:
            source = dict(self.llm.named_parameters())
            for name, weight in self.ref_llm.named_parameters():
                _local(weight).copy_(_local(source[name]))
        if self.has_adapter and REFERENCE_ADAPTER in self.llm.peft_config:
            trained = f".{self.llm.active_adapter}"
            weights = dict(self.llm.named_parameters())
            for name, weight in weights.items():
                if f".{REFERENCE_ADAPTER}" in name:
                    source_name = name.replace(f".{REFERENCE_ADAPTER}", trained)
                    _local(weight).copy_(_local(weights[source_name]))

    def reference_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and this rank's shards of the weights that the reference consists of."""
        model = self.llm if self.ref_llm is None else self.ref_llm
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        for name, value in torch.nn.Module.state_dict(model, keep_vars=True).items():
            if isinstance(value, Tensor) and not (self.has_adapter and name in trained):
                yield name, _local(value)


def _local(weight: Tensor) -> Tensor:
    """This rank's shard of a weight of FSDP or ZeRO-3; others as they are."""
    if hasattr(weight, "ds_tensor"):
        shard: Tensor = weight.ds_tensor
        return shard
    if hasattr(weight, "to_local"):
        local: Tensor = weight.to_local()
        return local
    return weight.detach()


def _is_identity(llm: torch.nn.Module) -> bool:
    """Whether an adapter leaves the model's outputs as they are: a LoRA whose B are all zero.

    Kinds of adapters that have no such weights are taken as switched off where they are new.
    """
    products = [
        weight
        for name, weight in llm.named_parameters()
        if "lora_B." in name or "lora_embedding_B." in name
    ]
    return all(weight.is_meta or not weight.any() for weight in products)


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
