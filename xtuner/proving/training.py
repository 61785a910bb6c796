"""A loss and its gradients, computed by the product and by plain transformers and peft."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xtuner.engine.runner.transfer import to_device
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.types import Batch

if TYPE_CHECKING:
    from xtuner.model.base import FinetuneModel


@dataclass
class Trained:
    """A loss, and the gradients of the weights by their names."""

    loss: float
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def loss_difference(self, wanted: Trained) -> float:
        """Relative difference of the losses."""
        return abs(self.loss - wanted.loss) / max(abs(wanted.loss), 1e-12)

    def missing(self, wanted: Trained) -> list[str]:
        """The weights that have a gradient in ``wanted`` alone."""
        names = {name for name, value in wanted.gradients.items() if value.any()}
        return sorted(names - self.gradients.keys())

    def gradient_difference(self, wanted: Trained) -> float:
        """Norm of the difference of all gradients, relative to the norm of those of ``wanted``."""
        return relative_difference(self.gradients, wanted.gradients)

    def difference(self, wanted: Trained) -> float:
        """The larger of both; infinite where a gradient is missing or not a number."""
        if self.missing(wanted):
            return math.inf
        found = (self.loss_difference(wanted), self.gradient_difference(wanted))
        return max(found) if all(map(math.isfinite, found)) else math.inf


def relative_difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Norm of the difference of two sets of tensors, relative to the norm of ``wanted``.

    Names of ``wanted`` alone are not looked at.
    """
    apart = sum(
        float(((value - wanted[name]) if name in wanted else value).double().square().sum())
        for name, value in found.items()
    )
    size = sum(float(value.double().square().sum()) for value in wanted.values())
    return math.sqrt(apart) / max(math.sqrt(size), 1e-12)


def token_ids(sample: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """What a language model takes of a sample of text: ``input_ids`` (1, S)."""
    return {"input_ids": torch.as_tensor(sample["input_ids"])[None]}


def plain_training(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    inputs_of: Callable[[Mapping[str, Any]], Mapping[str, Tensor]] = token_ids,
) -> Trained:
    """The mean loss over the labelled tokens of samples, each computed alone.

    Args:
        model: of transformers, or of peft.
        samples: with ``input_ids`` and ``labels`` (S,).
        inputs_of: what the model takes of a sample, in a batch of one.
    """
    model.zero_grad()
    labels = [torch.as_tensor(sample["labels"])[1:] for sample in samples]
    total = sum(int((each != IGNORE_INDEX).sum()) for each in labels)
    loss = 0.0
    for sample, targets in zip(samples, labels, strict=True):
        logits = model(**inputs_of(sample), use_cache=False).logits[0, :-1].float()
        share = nn.functional.cross_entropy(
            logits, targets, reduction="sum", ignore_index=IGNORE_INDEX
        )
        (share / total).backward()
        loss += float(share.detach()) / total
    return Trained(loss, gradients_of(model))


def train_on(model: FinetuneModel, batches: Sequence[Batch]) -> Trained:
    """The loss and gradients of the product over micro-batches of one step.

    Args:
        model: a ``FinetuneModel``, on any device.
        batches: of the config's collate function.
    """
    device = next(model.parameters()).device
    model.zero_grad()
    counts: dict[str, int] = {}
    for batch in batches:
        for name, count in model.num_items(batch).items():
            counts[name] = counts.get(name, 0) + int(count)
    loss = 0.0
    for batch in batches:
        data = to_device(model.prepare_batch(batch, device), device)
        share = model(data, mode="loss", num_items_in_batch=counts)["loss"]
        share.backward()
        loss += float(share.detach())
    return Trained(loss, gradients_of(model.llm))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by the name of the weight, on the CPU."""
    return {
        name: weight.grad.to("cpu", copy=True)
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def move_adapter(model: nn.Module) -> None:
    """Give the weights of an adapter that start as zeros other values."""
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=random) * 0.05)


def copy_trained(source: nn.Module, target: nn.Module) -> None:
    """Copy the trained weights of a model to those of the same names of another."""
    own = dict(source.named_parameters())
    with torch.no_grad():
        for name, weight in target.named_parameters():
            if weight.requires_grad:
                weight.copy_(own[name])
