"""What a forward pass keeps for its backward pass, counted without computing.

The model's own class runs on fake tensors (``torch._subclasses.FakeTensorMode``): shapes and dtypes
without memory. Of layers that are alike one runs, and counts for all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from xtuner.model.activation_checkpointing import (
    Checkpointing,
    disable_activation_checkpointing,
)
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
        largest_input: the largest input of a repeated layer.
    """

    outside: int
    layers: int
    inputs: int
    largest_layer: int
    largest_tensor: int
    largest_input: int = 0

    def kept(self, checkpointing: Checkpointing | None) -> int:
        """Bytes at the beginning of the backward pass, or while it recomputes a layer."""
        if checkpointing is None:
            return self.outside + self.layers
        stored = int(self.layers * (1 - checkpointing.share))
        inputs = self.inputs_of(checkpointing.share)
        if checkpointing.offload:  # the one in use, and the next, which is on its way
            inputs = min(inputs, 2 * self.largest_input)
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
            int(self.largest_input * count),
        )

    def with_images(self, images: Activations) -> Activations:
        """Those of a batch whose images keep this much on top."""
        return Activations(
            self.outside + images.outside,
            self.layers + images.layers,
            self.inputs + images.inputs,
            max(self.largest_layer, images.largest_layer),
            max(self.largest_tensor, images.largest_tensor),
            max(self.largest_input, images.largest_input),
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
        if self.computes_others and func is torch.ops.aten.index.Tensor:
            args = (args[0], _as_places(args[1]))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _as_places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices with the places of true values for each mask whose values are known.

    The shape of a result depends on how many these are, which a fake tensor cannot tell.
    """
    places: list[Tensor | None] = []
    for index in indices:
        if index is None or isinstance(index, FakeTensor) or index.dtype is not torch.bool:
            places.append(index)
        else:
            places += index.nonzero(as_tuple=True)
    return places


NO_LAYER = -1


class _Kept(NamedTuple):
    """A storage that is kept for the backward pass.

    Attributes:
        layer: the repeated layer that kept it first; ``NO_LAYER`` for what is not in one.
        is_input: whether it is the layer's input, which stays when the layer is recomputed.
        size: in bytes.
    """

    layer: int
    is_input: bool
    size: int


@dataclass
class _Recorder:
    """Where tensors that are kept for backward come from."""

    own: set[StorageWeakRef]
    layer: int = NO_LAYER
    seen: dict[StorageWeakRef, _Kept] = field(default_factory=dict)

    def keep(self, tensor: Tensor) -> Tensor:
        """A hook of ``saved_tensors_hooks``: each storage counts where it is first kept."""
        self._add(tensor, self.layer, is_input=False)
        return tensor

    def enter(self, index: int, tensor: Tensor) -> None:
        """A layer begins; its input stays when the layer is recomputed."""
        self.layer = index
        self._add(tensor, index, is_input=True)

    def _add(self, tensor: Tensor, layer: int, *, is_input: bool) -> None:
        storage = tensor.untyped_storage()
        key = StorageWeakRef(storage)
        if key not in self.own and key not in self.seen:
            self.seen[key] = _Kept(layer, is_input, storage.nbytes())

    def count(self, counts: Mapping[int, int]) -> Activations:
        """Add up what is still there: to be called while the forward pass's output is.

        An operation that the output does not depend on has then released what it kept. A layer that
        is recomputed has its input, whether or not its operations keep that themselves.

        Args:
            counts: how many layers each layer stands for; 1 where it is not in.
        """
        alive = [(key, kept) for key, kept in self.seen.items() if not key.expired()]
        inside: dict[int, int] = {}
        in_layers = [kept for _, kept in alive if kept.layer != NO_LAYER]
        for kept in in_layers:
            if not kept.is_input:
                inside[kept.layer] = inside.get(kept.layer, 0) + kept.size
        inputs = [kept for kept in self.seen.values() if kept.is_input and kept.layer in inside]
        return Activations(
            outside=sum(kept.size for _, kept in alive if kept.layer == NO_LAYER),
            layers=sum(kept.size * counts.get(kept.layer, 1) for kept in in_layers),
            inputs=sum(kept.size * counts.get(kept.layer, 1) for kept in inputs),
            largest_layer=max(inside.values(), default=0),
            largest_tensor=max((kept.size for _, kept in alive), default=0),
            largest_input=max((kept.size for kept in inputs), default=0),
        )


def trace_activations(
    model: nn.Module,
    language_model: Any,
    *,
    batch_size: int,
    length: int,
    autocast: torch.dtype,
    after_trained: bool = False,
) -> Activations:
    """Count what a micro-batch keeps for its backward pass, the loss left out.

    Args:
        model: the whole model, on the meta device; it is of no other use afterwards.
        language_model: the transformers model in it whose body is run; its attention is
            ``stand_ins.planned_attention``.
        batch_size: sequences of the micro-batch.
        length: tokens of each.
        autocast: what matrix products are computed in; float32 for no autocast.
        after_trained: whether weights before the language model are trained, so that gradients go
            through all of it, though it may be frozen.

    Raises:
        UserError: when the class looks at values, which fake tensors do not have.
    """
    counts = _keep_one_of_each(language_model)
    stand_ins.use_planned_experts(language_model)
    layers = _checkpointed_layers(language_model)
    with (
        FakeTensorMode(allow_non_fake_inputs=False),
        _recorded(model, layers, autocast) as recorder,
        _with_gradient(language_model.get_input_embeddings(), after_trained),
    ):
        output = _forward(language_model, batch_size, length)
        found = recorder.count(dict(enumerate(counts)))
        del output
    return found


def trace_image(
    model: nn.Module, encode: Callable[[], object], *, autocast: torch.dtype
) -> Activations | None:
    """Count what the layers for images keep of one image for the backward pass.

    Args:
        model: the whole model, on the meta device; its weights are replaced by fake tensors.
        encode: computes the features of a blank image, with these weights.
        autocast: what matrix products are computed in; float32 for no autocast.

    Returns:
        None for a class that looks at values that depend on weights.
    """
    mode = _FakeMode(allow_non_fake_inputs=True)
    model.train()
    try:
        with mode, _recorded(model, _checkpointed_layers(model), autocast) as recorder:
            mode.computes_others = True
            output = encode()
            found = recorder.count({})
            del output
    except Exception:  # whatever a model's own code fails with
        return None
    return found


@contextlib.contextmanager
def _recorded(
    model: nn.Module, layers: list[nn.Module], autocast: torch.dtype
) -> Iterator[_Recorder]:
    """Record what is kept where nothing is recomputed; fake tensors are the model's weights."""
    disable_activation_checkpointing(model)  # whose own hooks would take the place of ours
    _fill(model)
    weights = (*model.parameters(), *model.buffers())
    recorder = _Recorder({StorageWeakRef(weight.untyped_storage()) for weight in weights})
    saved = torch.autograd.graph.saved_tensors_hooks(recorder.keep, _same)
    with _hooks(layers, recorder), _autocast(autocast), saved:
        yield recorder


@contextlib.contextmanager
def _with_gradient(embeddings: nn.Module, wanted: bool) -> Iterator[None]:
    """Let what the embeddings give depend on trained weights, where that is wanted."""

    def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.requires_grad_()

    handle = embeddings.register_forward_hook(hook) if wanted else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _forward(language_model: Any, batch_size: int, length: int) -> object:
    language_model.train()
    try:
        return language_model.base_model(
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
        recorder.layer = NO_LAYER

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
