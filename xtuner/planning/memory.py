"""Bytes of one GPU: weights, gradients, optimizer, gathered weights, activations, loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from xtuner.model.backends.gpu.cross_entropy import SIZES
from xtuner.model.lora.experts import expert_tensors
from xtuner.planning.activations import Activations
from xtuner.planning.planned_model import PlannedModel
from xtuner.planning.settings import RunSettings, Sharding
from xtuner.utils.lang import N_

MARGIN, MARGIN_OF_STATE = 0.1, 0.02
"""Shares added for what the allocator cannot use (fragmentation): of tensors that come and go in
each step, and of those that stay."""
WORKING_TENSORS = 3
"""Tensors of the size of the largest that the backward pass has at a time beside what is kept."""
LIBRARIES = int(0.75 * 2**30)
"""Of CUDA's context and the libraries' workspaces (cuBLAS, NCCL), before the first tensor."""
STATES = {
    "Adam": 2,
    "AdamW": 2,
    "NAdam": 2,
    "RAdam": 2,
    "Adamax": 2,
    "AMSGrad": 3,
    "Lion": 1,
    "RMSprop": 1,
    "Adagrad": 1,
    "SGD": 1,
}
"""Values that an optimizer keeps for each trained one, momentum included; 2 for others."""
BLOCK_8BIT, LARGE_FOR_8BIT = 256, 4096
"""Values of a scale in bitsandbytes' 8-bit states; smaller tensors have float32 states."""
LARGE_FOR_PAGES = 100_000
"""Values of a weight from which on a paged optimizer of bitsandbytes pages its states."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the moment that needs most.

    Attributes:
        weights: trained and frozen, as the run keeps them.
        gradients: of the trained weights.
        optimizer: its state, and float32 copies of weights where DeepSpeed has them.
        temporary: weights that are here while a layer computes: gathered from other ranks, or
            dequantised.
        activations: what the forward pass keeps for the backward pass, and what that works with.
        loss: the gradients of head and hidden states, and of the blocks of logits what is more than
            a layer needs later.
        libraries: of CUDA and of libraries, before the first tensor.
        margin: for fragmentation.
        offloaded: what is in main memory instead, no part of the total.
    """

    weights: int
    gradients: int
    optimizer: int
    temporary: int
    activations: int
    loss: int
    libraries: int
    margin: int
    offloaded: int = 0

    @property
    def total(self) -> int:
        return sum(size for _, size in self.parts())

    def parts(self) -> Iterator[tuple[str, int]]:
        """(what, bytes) of each part; messages to be translated."""
        yield N_("weights"), self.weights
        yield N_("gradients"), self.gradients
        yield N_("optimizer"), self.optimizer
        yield N_("temporary weights"), self.temporary
        yield N_("activations"), self.activations
        yield N_("loss"), self.loss
        yield N_("CUDA and libraries"), self.libraries
        yield N_("margin for fragmentation"), self.margin


@dataclass(frozen=True)
class StateSizes:
    """Bytes and counts of a model's weights before they are sharded.

    Attributes:
        trained: bytes of trained weights.
        frozen: bytes of frozen weights, in 4 bits where they are.
        quantized: those of ``frozen`` that are quantised, which FSDP does not shard.
        trained_count: trained parameters.
        optimizer: bytes of the optimizer's state.
        paged: those of them that move to main memory where the GPU has no room.
        largest_layer: parameters of the largest repeated layer.
        root: parameters outside of repeated layers.
        count: parameters in all.
        computed: parameters that a token passes: of experts, those that are chosen.
        largest_quantized: parameters of the largest quantised weight.
    """

    trained: int
    frozen: int
    quantized: int
    trained_count: int
    optimizer: int
    largest_layer: int
    root: int
    count: int
    computed: int
    largest_quantized: int
    paged: int = 0


class Head(NamedTuple):
    """The layer from hidden states to logits: its width, its rows, its trained parameters."""

    width: int
    vocabulary: int
    trained: int


def state_sizes(built: PlannedModel, optimizer: str, chosen_experts: float) -> StateSizes:
    """Add up a model's weights.

    Args:
        built: the model without weights.
        optimizer: name of the optimizer's class.
        chosen_experts: of a mixture's experts, the share that computes a token.
    """
    weights = list(built.model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    frozen = [weight for weight in weights if not weight.requires_grad]
    in_layers = [sum(w.numel() for w in layer.parameters()) for layer in _layers(built.model)]
    count = sum(weight.numel() for weight in weights)
    return StateSizes(
        trained=sum(map(built.size_of, trained)),
        frozen=sum(map(built.size_of, frozen)),
        quantized=sum(built.quantized.get(id(weight), 0) for weight in frozen),
        trained_count=sum(weight.numel() for weight in trained),
        optimizer=sum(optimizer_bytes(weight, optimizer) for weight in trained),
        paged=sum(paged_bytes(weight, optimizer) for weight in trained),
        largest_layer=max(in_layers, default=0),
        root=count - sum(in_layers),
        count=count,
        computed=count - int((1 - chosen_experts) * _in_experts(built.model)),
        largest_quantized=max((w.numel() for w in frozen if id(w) in built.quantized), default=0),
    )


def _in_experts(model: nn.Module) -> int:
    return sum(getattr(module, name).numel() for module, name in expert_tensors(model))


def optimizer_bytes(weight: nn.Parameter, optimizer: str) -> int:
    """Bytes of an optimizer's state for one trained weight.

    Args:
        weight: its shape and dtype count.
        optimizer: name of the optimizer's class.
    """
    count, states = weight.numel(), _states(optimizer)
    if _is_of_bitsandbytes(optimizer):
        size, scales = _values_and_scales(count, optimizer)
        return states * (size + scales)
    step = 4 if states > 1 else 0  # torch's Adam family has a step in float32
    return states * weight.element_size() * count + step


def paged_bytes(weight: nn.Parameter, optimizer: str) -> int:
    """Those of ``optimizer_bytes`` that are paged: values, but no scales."""
    count = weight.numel()
    if not optimizer.startswith("Paged") or count < LARGE_FOR_PAGES:
        return 0
    return _states(optimizer) * _values_and_scales(count, optimizer)[0]


def _states(optimizer: str) -> int:
    name = optimizer.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")
    return STATES.get(name, 2)


def _is_of_bitsandbytes(optimizer: str) -> bool:
    return optimizer.startswith("Paged") or optimizer.endswith("bit")


def _values_and_scales(count: int, optimizer: str) -> tuple[int, int]:
    """Bytes of one of bitsandbytes' states."""
    if optimizer.endswith("8bit") and count >= LARGE_FOR_8BIT:
        return count, 4 * -(-count // BLOCK_8BIT)
    return 4 * count, 0


def memory_of(
    sizes: StateSizes,
    activations: Activations,
    settings: RunSettings,
    *,
    head: Head,
) -> Memory:
    """Add up what one GPU holds in the step's largest moment.

    Args:
        sizes: of the model's weights.
        activations: of a micro-batch.
        settings: of the run.
        head: the model's head.
    """
    sharding = settings.sharding
    weights, gradients, optimizer, offloaded = _state(sizes, sharding)
    optimizer, offloaded = optimizer - sizes.paged, offloaded + sizes.paged
    kept = activations.kept(settings.checkpointing)
    if settings.checkpointing is not None and settings.checkpointing.offload:
        offloaded += activations.inputs_of(settings.checkpointing.share)
    working = WORKING_TENSORS * activations.largest_tensor
    in_layer = working + (activations.largest_layer if settings.checkpointing else 0)
    kept += working
    half = 2 if settings.dtype != "float32" else 4
    outside, blocks = _loss(settings.tokens_of_gpu, head, half)
    # the loss is done before the backward pass of the last layer begins
    loss = outside + max(0, blocks - in_layer)
    temporary = half * sizes.largest_quantized
    if sharding.name in ("zero3", "fsdp") and sharding.ranks > 1:
        # a layer is computed while the next one is gathered; the root's weights stay
        temporary += half * min(sizes.count, 2 * sizes.largest_layer + sizes.root)
    if not settings.fused and not sharding.offload_optimizer:
        # the step copies all trained weights; activations are gone by then
        copies = int(sharding.of(sizes.trained, from_stage=1))
        temporary += max(0, copies - temporary - kept - loss)
    state, transient = weights + gradients + optimizer, temporary + kept + loss
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        temporary=temporary,
        activations=kept,
        loss=loss,
        libraries=LIBRARIES,
        margin=int(MARGIN * transient + MARGIN_OF_STATE * state),
        offloaded=offloaded,
    )


def _state(sizes: StateSizes, sharding: Sharding) -> tuple[int, int, int, int]:
    """(weights, gradients, optimizer) on one GPU, and what it has in main memory."""
    if sharding.is_deepspeed:
        # half precision weights and gradients; the optimizer has float32 copies and its state
        half, copies = 2 * sizes.trained_count, 4 * sizes.trained_count
        weights = sharding.of(half + sizes.frozen, from_stage=3)
        gradients = sharding.of(half, from_stage=2)
        per_value = sizes.optimizer / max(1, sizes.trained)
        state = 4 * sizes.trained_count * per_value
        optimizer = sharding.of(copies + state, from_stage=1)
    else:
        sharded = sizes.trained + sizes.frozen - sizes.quantized
        weights = sharding.of(sharded, from_stage=3) + sizes.quantized
        gradients = sharding.of(sizes.trained, from_stage=3)
        optimizer = sharding.of(sizes.optimizer, from_stage=3)
    everything = weights + gradients + optimizer
    if sharding.offload_weights:
        weights = sizes.quantized
    if sharding.offload_optimizer:
        optimizer = 0
        gradients = 0 if sharding.name == "fsdp" else gradients
    offloaded = everything - weights - gradients - optimizer
    return int(weights), int(gradients), int(optimizer), int(offloaded)


def _loss(tokens: int, head: Head, half: int) -> tuple[int, int]:
    """Of ``backends.cross_entropy``: what stays after it, and its blocks of logits.

    Hidden states, their float32 gradient and that of the head stay.
    """
    hidden = tokens * head.width * (half + 4)
    logits = tokens * head.vocabulary
    blocks = half * min(logits, SIZES.kept_logits) + 3 * 4 * min(logits, SIZES.part_of(logits))
    return hidden + 4 * head.trained, blocks


def _layers(model: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
