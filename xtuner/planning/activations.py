"""What a forward pass keeps for its backward pass, counted without computing.

The model's own class runs on fake tensors (``torch._subclasses.FakeTensorMode``): shapes and dtypes
without memory. Of layers that are alike one runs, and counts for all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from xtuner.model.activation_checkpointing import Checkpointing
from xtuner.planning import stand_ins
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass of one micro-batch keeps.

    Attributes:
        outside: by what is not in a repeated layer (embedding, last norm).
        layers: by all repeated layers, when nothing is recomputed.
        inputs: of all repeated layers: what is kept of them when they are recomputed.
        largest_layer: by the layer that keeps most; there once when layers are recomputed.
        largest_tensor: the largest tensor that is kept, as a measure of what the backward pass
            itself needs.
    """

    outside: int
    layers: int
    inputs: int
    largest_layer: int
    largest_tensor: int

    def kept(self, checkpointing: Checkpointing | None) -> int:
        """Bytes at the beginning of the backward pass, or while it recomputes a layer."""
        if checkpointing is None:
            return self.outside + self.layers
        stored = int(self.layers * (1 - checkpointing.share))
        inputs = 0 if checkpointing.offload else self.inputs_of(checkpointing.share)
        return self.outside + inputs + stored + self.largest_layer

    def inputs_of(self, share: float) -> int:
        """Bytes of the inputs of the layers that are recomputed, a share of all."""
        return int(self.inputs * share)

    def of_batches(self, count: float) -> Activations:
        """Those of a batch that is ``count`` times as large."""
        return Activations(
            int(self.outside * count),
            int(self.layers * count),
            int(self.inputs * count),
            int(self.largest_layer * count),
            int(self.largest_tensor * count),
        )

    def with_images(self, images: Activations) -> Activations:
        """Those of a batch whose images keep this much on top."""
        return Activations(
            self.outside + images.outside,
            self.layers + images.layers,
            self.inputs + images.inputs,
            max(self.largest_layer, images.largest_layer),
            max(self.largest_tensor, images.largest_tensor),
        )


class _FakeMode(FakeTensorMode):
    """Fake tensors; with ``computes_others``, what has none among its inputs is computed.

    Layers for images look at the values of sizes and positions, which depend on no weight.
    """

    computes_others = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.computes_others and not any(issubclass(kind, FakeTensor) for kind in types):
            return func(*args, **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


@dataclass
class _Recorder:
    """Where tensors that are kept for backward come from."""

    own: set[StorageWeakRef]
    layer: int | None = None
    seen: dict[StorageWeakRef, int] = field(default_factory=dict)
    held: list[Tensor] = field(default_factory=list)
    outside: int = 0
    by_layer: dict[int, int] = field(default_factory=dict)
    input_of: dict[int, int] = field(default_factory=dict)

    def keep(self, tensor: Tensor) -> Tensor:
        """A hook of ``saved_tensors_hooks``: each storage counts where it is first kept."""
        size = self._first_size(tensor)
        if self.layer is None:
            self.outside += size
        else:
            self.by_layer[self.layer] += size
        return tensor

    def enter(self, index: int, tensor: Tensor) -> None:
        """A layer begins; its input stays when the layer is recomputed."""
        self.layer = index
        self.by_layer[index] = 0
        self.input_of[index] = self._first_size(tensor)

    def _first_size(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = StorageWeakRef(storage)
        if key in self.own or key in self.seen:
            return 0
        self.seen[key] = storage.nbytes()
        self.held.append(tensor)  # its storage would be another's later
        return storage.nbytes()


def trace_activations(
    model: nn.Module, language_model: Any, *, batch_size: int, length: int, autocast: torch.dtype
) -> Activations:
    """Count what a micro-batch keeps for its backward pass, the loss left out.

    Args:
        model: the whole model, on the meta device; it is of no other use afterwards.
        language_model: the transformers model in it whose body is run; its attention is
            ``stand_ins.planned_attention``.
        batch_size: sequences of the micro-batch.
        length: tokens of each.
        autocast: what matrix products are computed in; float32 for no autocast.

    Raises:
        UserError: when the class looks at values, which fake tensors do not have.
    """
    counts = _keep_one_of_each(language_model)
    stand_ins.use_planned_experts(language_model)
    layers = _checkpointed_layers(language_model)
    with (
        FakeTensorMode(allow_non_fake_inputs=False),
        _recorded(model, layers, autocast) as recorder,
    ):
        _forward(language_model, batch_size, length)
    # layers of a vision tower are not called for text
    inside = [recorder.by_layer.get(index, 0) for index in range(len(layers))]
    inputs = [recorder.input_of.get(index, 0) for index in range(len(layers))]
    return Activations(
        outside=recorder.outside,
        layers=sum(n * (size + kept) for n, size, kept in zip(counts, inside, inputs, strict=True)),
        inputs=sum(n * kept for n, kept in zip(counts, inputs, strict=True)),
        largest_layer=max(inside, default=0),
        largest_tensor=max(recorder.seen.values(), default=0),
    )


def trace_image(
    model: nn.Module,
    language_model: Any,
    arguments: Mapping[str, Any],
    *,
    autocast: torch.dtype,
) -> Activations | None:
    """Count what the layers for images keep of one image for the backward pass.

    Args:
        model: the whole model, on the meta device; its weights are replaced by fake tensors.
        language_model: the transformers model in it.
        arguments: of its ``get_image_features``.
        autocast: what matrix products are computed in; float32 for no autocast.

    Returns:
        None for a class that looks at values that depend on weights.
    """
    mode = _FakeMode(allow_non_fake_inputs=True)
    layers = _checkpointed_layers(language_model)
    language_model.train()
    try:
        with mode, _recorded(model, layers, autocast) as recorder:
            mode.computes_others = True
            language_model.base_model.get_image_features(**arguments, return_dict=True)
    except Exception:  # whatever a model's own code fails with
        return None
    inside, inputs = recorder.by_layer, recorder.input_of
    return Activations(
        outside=recorder.outside,
        layers=sum(inside.values()) + sum(inputs.values()),
        inputs=sum(inputs.values()),
        largest_layer=max(inside.values(), default=0),
        largest_tensor=max(recorder.seen.values(), default=0),
    )


@contextlib.contextmanager
def _recorded(
    model: nn.Module, layers: list[nn.Module], autocast: torch.dtype
) -> Iterator[_Recorder]:
    """Record what is kept, with fake tensors in place of a model's weights."""
    _fill(model)
    weights = (*model.parameters(), *model.buffers())
    recorder = _Recorder({StorageWeakRef(weight.untyped_storage()) for weight in weights})
    saved = torch.autograd.graph.saved_tensors_hooks(recorder.keep, _same)
    with _hooks(layers, recorder), _autocast(autocast), saved:
        yield recorder


def _forward(language_model: Any, batch_size: int, length: int) -> None:
    language_model.train()
    try:
        language_model.base_model(
            input_ids=torch.zeros(batch_size, length, dtype=torch.long),
            # without a mask transformers looks for packed samples in the values of positions
            attention_mask=torch.ones(batch_size, length, dtype=torch.long),
            use_cache=False,
        )
    except Exception as error:  # whatever a model's own code fails with
        raise UserError(
            tr(
                "the activations of {name} cannot be counted: its forward pass depends on values.",
                name=type(language_model).__name__,
            ),
            hint=tr("train a few steps on the card, and look at nvidia-smi."),
            where=Where(key="model.llm"),
        ) from error


def _checkpointed_layers(language_model: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in language_model.modules() if isinstance(m, GradientCheckpointingLayer)]


def _keep_one_of_each(language_model: nn.Module) -> list[int]:
    """Take layers that are like another out of the model; how many each that stays stands for."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    counts: list[int] = []
    for layers in language_model.modules():
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            continue
        if not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
            continue
        kinds: dict[object, list[nn.Module]] = {}
        for layer in layers:
            kinds.setdefault(_kind(layer), []).append(layer)
        layers._modules.clear()
        for index, alike in enumerate(kinds.values()):
            layers._modules[str(index)] = alike[0]
            counts.append(len(alike))
    return counts


def _kind(layer: nn.Module) -> object:
    weights = tuple(
        (name, w.shape, w.dtype, w.requires_grad) for name, w in layer.named_parameters()
    )
    return type(layer), getattr(layer, "attention_type", None), weights


def _fill(model: nn.Module) -> None:
    """Put fake tensors of the CPU in place of those of the meta device, which have no autocast."""
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            if id(weight) not in made:
                fake = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
                made[id(weight)] = nn.Parameter(fake, requires_grad=weight.requires_grad)
            module._parameters[name] = made[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


@contextlib.contextmanager
def _hooks(layers: list[nn.Module], recorder: _Recorder) -> Iterator[None]:
    def before(index: int) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorder.enter(index, args[0] if args else kwargs["hidden_states"])

        return enter

    def leave(*_: object) -> None:
        recorder.layer = None

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(before(index), with_kwargs=True))
        handles.append(layer.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _autocast(dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    if dtype is torch.float32:
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype)


def _same(tensor: Tensor) -> Tensor:
    return tensor
