"""Proofs about one loss and its gradients: other rows, other code, recomputed, compiled."""

from __future__ import annotations

import functools
import inspect
import shutil
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

import torch
from mmengine.config import ConfigDict

from xtuner.model.backends.cpu import kernels
from xtuner.model.lora.targets import not_reached_by_text
from xtuner.proving.proof import ROUNDING, Measured, Proof, Skipped, prove
from xtuner.proving.subject import Sample, Subject, iter_ids
from xtuner.proving.training import Trained, copy_trained, plain_training, train_on
from xtuner.registry import BUILDER
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from torch import nn

    from xtuner.model.base import FinetuneModel
    from xtuner.model.modules.vision_parts import VisionParts
    from xtuner.model.sft import SupervisedFinetune

COMPILERS = ("c++", "g++", "clang++")


class GradientProofs:
    """Proofs that share one computation of the product.

    Args:
        subject: what is computed with.
        compile: prove the compiled model, too.
    """

    def __init__(self, subject: Subject, *, compile: bool = False) -> None:
        self.subject, self.compile = subject, compile

    def all(self) -> list[Proof]:
        """All of them."""
        return [
            prove("plain", self.plain),
            prove("packed", self.packed),
            prove("checkpointed", self.checkpointed),
            prove("compiled", self.compiled),
            prove("gpu", self.on_gpu),
            prove("gradients", self.gradients),
        ]

    @functools.cached_property
    def model(self) -> Any:
        """The product's model."""
        return self.subject.model()

    @functools.cached_property
    def found(self) -> Trained:
        """The loss and gradients of the rows in one micro-batch, by the product."""
        subject = self.subject
        return train_on(self.model, [subject.batch(subject.rows)])

    @functools.cached_property
    def reference(self) -> Any:
        """The same model by transformers and peft alone, with its own attention."""
        from peft import get_peft_model

        settings = {**self.subject.cfg.model.llm, "attn_implementation": "eager"}
        plain: Any = BUILDER.build(ConfigDict(settings))
        adapted = getattr(self.model.llm, "peft_config", None)
        if adapted is not None:
            plain = get_peft_model(plain, adapted["default"])
        elif self.parts is None:
            for name in not_reached_by_text(plain):
                plain.get_submodule(name).requires_grad_(False)
        if self.parts is not None:
            _freeze_parts(plain, self.parts, self.subject.cfg.model)
        copy_trained(self.model.llm, plain)
        return plain.eval()

    @property
    def parts(self) -> VisionParts | None:
        """The parts of a model of images and text; None for text."""
        return getattr(self.model, "parts", None)

    def _is_of_vision(self, name: str) -> bool:
        return self.parts is not None and self.parts.part_of(name) != "language_model"

    @functools.cached_property
    def wanted(self) -> Trained:
        """The loss and gradients of each sample by transformers and peft."""
        plain, subject = self.reference, self.subject
        own = plain.get_base_model() if hasattr(plain, "peft_config") else plain
        known = inspect.signature(own.forward).parameters
        return plain_training(
            plain, self.plain_samples, lambda sample: subject.plain_inputs(sample, known)
        )

    @property
    def plain_samples(self) -> Sequence[Sample]:
        """What is computed alone: samples, or rows whose samples see each other."""
        return self.subject.rows if self.subject.joins else self.subject.samples

    def plain(self) -> Measured:
        """The product's rows against each sample by transformers and peft."""
        subject, model = self.subject, self.model
        if not subject.is_supervised:
            raise Skipped(
                tr(
                    "{name} has no counterpart in transformers; its logits are the exported "
                    "model's, which is proved below.",
                    name=type(model).__name__,
                )
            )
        _require_plain_loss(model)
        samples, wanted = self.plain_samples, self.wanted
        tokens = sum(len(sample["input_ids"]) for sample in samples)
        detail = tr(
            "{name}, {count} samples, {tokens:,} tokens",
            name=type(model.causal_lm).__name__,
            count=len(samples),
            tokens=tokens,
        )
        return Measured(self.found.difference(wanted), detail)

    def packed(self) -> Measured:
        """The product's rows against each sample by the product."""
        subject = self.subject
        rows, samples = subject.rows, subject.samples
        if subject.joins:  # samples of a row see each other, by the config
            samples = rows
        if len(samples) < 2:
            raise Skipped(tr("there is one sample."))
        wanted = train_on(self.model, [subject.batch([sample]) for sample in samples])
        longest = max(len(next(iter_ids(sample))) for sample in samples)
        detail = tr(
            "{rows} rows of {count} samples, the longest of {longest} tokens",
            rows=len(rows),
            count=len(samples),
            longest=longest,
        )
        return Measured(self.found.difference(wanted), detail)

    def checkpointed(self) -> Measured:
        """Activations recomputed against kept ones."""
        model = self.subject.model(use_activation_checkpointing=True).train()
        wanted = self.found
        batch = self.subject.batch(self.subject.rows)
        return Measured(train_on(model, [batch]).difference(wanted))

    def compiled(self) -> Measured:
        """The distance of the compiled model's gradients from those of float32, by the other's."""
        if not self.compile:
            raise Skipped(tr("a compiler takes 10 to 40 seconds: --compile proves it."))
        if not any(map(shutil.which, COMPILERS)):
            raise Skipped(tr("there is no C++ compiler on this machine (apt-get install g++)."))
        batch = self.subject.batch(self.subject.rows)
        with torch.autocast("cpu", torch.bfloat16):
            plain = train_on(self.subject.model(), [batch])
            model = self.subject.model(compile=True)
            kernels.compile_kernels()
            try:
                compiled = train_on(model, [batch])
                failed = not kernels.Kernel.compiled
            finally:
                kernels.Kernel.compiled = False
        if failed:
            raise Skipped(tr("the C++ compiler fails: {why}", why=kernels.Kernel.failure))
        names = [name for name, each in vars(kernels).items() if _is_compiled(each)]
        if not names:
            raise Skipped(tr("this model computes with no kernel that is compiled on a CPU."))
        off = [each.gradient_difference(self.found) for each in (compiled, plain)]
        if compiled.missing(self.found) or not isfinite(compiled.difference(plain)):
            return Measured(inf, ", ".join(names))
        return Measured(off[0] / max(off[1], ROUNDING), ", ".join(names))

    def on_gpu(self) -> Measured:
        """The functions that are chosen for a GPU, on it, against those of the CPU."""
        device = gpu()
        if device is None:
            raise Skipped(tr("there is no GPU on this machine."))
        wanted, batch = self.found, self.subject.batch(self.subject.rows)
        with torch.backends.cudnn.flags(allow_tf32=False):
            found = train_on(self.subject.model(device), [batch])
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return Measured(found.difference(wanted), tr("{name}, float32", name=name))

    def gradients(self) -> Measured:
        """Which weights have a gradient, against those that peft and the config train."""
        model = self.model
        self.found  # noqa: B018  which leaves the gradients in the model
        train_on(model, [self.subject.batch(self.subject.rows)])
        own = dict(model.llm.named_parameters())
        wanted = {n for n, w in self.reference.named_parameters() if w.requires_grad}
        if self.parts is not None and self.subject.is_supervised:
            # no pooler, and no layer after the one whose output is taken
            wanted &= self.wanted.gradients.keys()
        elif self.parts is not None:
            wanted -= {n for n, w in own.items() if not w.requires_grad and self._is_of_vision(n)}
        unused = unused_experts(model)
        wrong = []
        for name, weight in own.items():
            grad = weight.grad
            if weight.requires_grad != (name in wanted):
                wrong.append(f"{name}: {_trained_or_frozen(weight)}")
            elif not weight.requires_grad and grad is not None:
                wrong.append(f"{name}: {tr('frozen, but with a gradient')}")
            elif weight.requires_grad and name not in unused:
                wrong += [f"{name}: {fault}" for fault in _faults(grad)]
        trained = sum(weight.requires_grad for weight in own.values())
        detail = tr(
            "{trained} trained weights, {frozen} frozen ones",
            trained=trained,
            frozen=len(own) - trained,
        )
        return Measured(len(wrong), "; ".join(wrong[:3]) if wrong else detail)


def _freeze_parts(plain: nn.Module, parts: VisionParts, settings: Mapping[str, Any]) -> None:
    """Freeze in a model of images and text what the config's model does not train."""
    frozen = {
        "visual_encoder": settings.get("freeze_visual_encoder", True),
        "projector": settings.get("freeze_projector", True),
        "language_model": settings.get("freeze_llm", False),
        "other": True,
    }
    for name, weight in plain.named_parameters():
        if frozen[parts.part_of(name)] and "lora_" not in name:
            weight.requires_grad_(False)


def gpu() -> torch.device | None:
    """The GPU at hand; None where there is none."""
    return torch.device("cuda") if torch.cuda.is_available() else None


def _is_compiled(value: object) -> bool:
    return isinstance(value, kernels.Kernel) and value._compiled is not None


def unused_experts(model: FinetuneModel) -> set[str]:
    """Weights of experts that are kept apart, to which no token may have gone."""
    from torch import nn

    lists = {
        name
        for name, module in model.llm.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "experts"
    }
    names = (name for name, _ in model.llm.named_parameters())
    return {name for name in names if any(name.startswith(f"{each}.") for each in lists)}


def _require_plain_loss(model: SupervisedFinetune) -> None:
    from xtuner.model.modules.loss import LossConfig

    if model.loss_config != LossConfig():
        raise Skipped(tr("transformers has no label_smoothing or z_loss."))
    if getattr(model.causal_lm.config, "output_router_logits", False):
        raise Skipped(tr("the router's loss is that of a whole batch in transformers."))
    experts = any(name.rpartition(".")[2] == "experts" for name, _ in model.llm.named_modules())
    if experts and getattr(model.causal_lm, "is_quantized", False):
        raise Skipped(tr("experts are kept in 4 bits here, which transformers does not do."))


def _trained_or_frozen(weight: torch.Tensor) -> str:
    if weight.requires_grad:
        return tr("trained, which the config does not ask for")
    return tr("frozen, but the config trains it")


def _faults(grad: torch.Tensor | None) -> list[str]:
    if grad is None:
        return [tr("no gradient")]
    if not grad.isfinite().all():
        return [tr("a gradient that is not finite")]
    return [] if grad.any() else [tr("a gradient of zeros")]
