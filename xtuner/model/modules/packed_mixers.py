"""Token mixers that do not know ``cu_seqlens``, computed sample by sample in a packed row.

Convolutions, state spaces and linear attention carry a state along the row, from one packed sample
into the next; and some attention modules never receive ``cu_seqlens``. Such modules are found by
trying: their input is changed in the first sample, and their output is compared in the second.
Their ``forward`` is then called once for each sample. Everything else (attention that takes
``cu_seqlens``, MLPs, norms) still computes the whole row at once. Where that is not enough, as with
position embeddings that ignore ``position_ids``, the whole model is called once for each sample.
Classes, names and weights stay as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

CU_SEQLENS = ("cu_seq_lens_q", "cu_seq_lens_k")
PACKING_ARGUMENTS = frozenset({*CU_SEQLENS, "max_length_q", "max_length_k"})
MIXES = 2e-2
"""Relative change of an output token that no rounding explains."""


def find_mixers(model: nn.Module, run: Callable[[], object], boundary: int) -> list[str]:
    """Find the modules that carry something from the first packed sample into the second.

    Args:
        model: a transformers model; the children of its decoder layers are tried.
        run: calls the model, without gradients, on one packed row of two samples.
        boundary: the second sample's first token.

    Returns:
        Names of modules within ``model``, in the order of its layers: those whose output changes,
        and those that refuse packed rows.
    """
    trials: list[_Trial] = []
    hooks = []
    for layer_name, layer in _layers(model).items():
        cu_seqlens = _CuSeqlens()
        hooks.append(layer.register_forward_pre_hook(cu_seqlens.take, with_kwargs=True))
        for child_name, child in layer.named_children():
            trials.append(_Trial(f"{layer_name}.{child_name}", child, cu_seqlens, boundary))
    try:
        run()
    finally:
        for trial in trials:
            trial.end()
        for hook in hooks:
            hook.remove()
    return [trial.name for trial in trials if trial.mixes]


def split_mixers(model: nn.Module, names: Sequence[str]) -> None:
    """Make modules compute packed rows sample by sample.

    Args:
        model: a transformers model, or a peft model around it.
        names: of modules that are children of decoder layers, from ``find_mixers``.
    """
    for name in names:
        layer = model.get_submodule(name.rpartition(".")[0])
        mixer: Any = model.get_submodule(name)
        cu_seqlens = _CuSeqlens()
        layer.register_forward_pre_hook(cu_seqlens.take, with_kwargs=True)
        mixer.forward = _PerSample(mixer.forward, cu_seqlens)


def split_body(body: nn.Module) -> Callable[[], None]:
    """Make a whole model compute packed rows sample by sample, as if each were alone.

    Args:
        body: whose output is a ``ModelOutput``; the ``base_model`` of a transformers model.

    Returns:
        A function that undoes it.
    """
    before = body.__dict__.get("forward")
    body.forward = _BodyPerSample(body.forward)

    def undo() -> None:
        if before is None:
            del body.forward
        else:
            body.forward = before

    return undo


class _BodyPerSample:
    """The ``forward`` of a model, called once for each packed sample.

    Of its output the first tensor with tokens is kept: hidden states (1, S, H), or logits.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: object, **kwargs: Any) -> Any:
        cu_seqlens = kwargs.get(CU_SEQLENS[0])
        if cu_seqlens is None:
            return self.forward(*args, **kwargs)
        boundaries = cu_seqlens.tolist()
        kwargs = {name: v for name, v in kwargs.items() if name not in PACKING_ARGUMENTS}
        outputs = []
        for start, stop in itertools.pairwise(boundaries):
            part = slice(start, stop)
            if start < stop:
                named = {
                    name: _sliced(value, part, boundaries[-1]) for name, value in kwargs.items()
                }
                positional = [_sliced(value, part, boundaries[-1]) for value in args]
                outputs.append(self.forward(*positional, **named))
        names = ("last_hidden_state", "logits")
        (name,) = [name for name in names if outputs[0].get(name) is not None]
        return type(outputs[0])(**{name: torch.cat([each[name] for each in outputs], dim=1)})


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer)
    }


@dataclass
class _CuSeqlens:
    """``cu_seqlens`` of the layer that is being computed: its keyword arguments bring them.

    They are taken in each call, so that a layer that is computed again in the backward pass
    (activation checkpointing) has its own.
    """

    values: list[int] = field(default_factory=list)

    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        cu_seqlens = kwargs.get(CU_SEQLENS[0])
        self.values = [] if cu_seqlens is None else cu_seqlens.tolist()


class _PerSample:
    """The ``forward`` of a module, called once for each packed sample."""

    def __init__(self, forward: Callable[..., object], cu_seqlens: _CuSeqlens) -> None:
        self.forward, self.cu_seqlens = forward, cu_seqlens

    def __call__(self, *args: object, **kwargs: object) -> object:
        cu_seqlens = self.cu_seqlens.values
        if not cu_seqlens:
            return self.forward(*args, **kwargs)
        kwargs = {name: None if name in PACKING_ARGUMENTS else v for name, v in kwargs.items()}
        outputs = []
        for start, stop in itertools.pairwise(cu_seqlens):
            if start == stop:
                continue
            part = slice(start, stop)
            positional = [_sliced(value, part, cu_seqlens[-1]) for value in args]
            named = {name: _sliced(value, part, cu_seqlens[-1]) for name, value in kwargs.items()}
            outputs.append(self.forward(*positional, **named))
        return _joined(outputs)


class _Trial:
    """A module whose ``forward`` is called again with another first sample."""

    def __init__(self, name: str, module: nn.Module, cu_seqlens: _CuSeqlens, boundary: int) -> None:
        self.name, self.module, self.cu_seqlens, self.boundary = name, module, cu_seqlens, boundary
        self.mixes = False
        self.replaced = module.__dict__.get("forward")
        self.forward: Callable[..., object] = module.forward
        module.forward = self.call

    def end(self) -> None:
        """Give the module its ``forward`` back."""
        if self.replaced is None:
            del self.module.forward
        else:
            self.module.forward = self.replaced

    def call(self, *args: object, **kwargs: object) -> object:
        if not self.cu_seqlens.values:  # a call without packed samples
            return self.forward(*args, **kwargs)
        try:
            output = self.forward(*args, **kwargs)
        except Exception:  # libraries say in many ways that they cannot compute packed rows
            self.mixes = True
            return _PerSample(self.forward, self.cu_seqlens)(*args, **kwargs)
        hidden = args[0] if args else kwargs.get("hidden_states")
        before = _first_tensor(output)
        if not isinstance(hidden, Tensor) or before is None or before.ndim != 3:
            return output
        if hidden.shape[:2] != before.shape[:2]:
            return output
        changed = hidden.clone()
        changed[:, : self.boundary] = changed[:, : self.boundary].flip(1) * 2 + hidden.std()
        if args:
            after = _first_tensor(self.forward(changed, *args[1:], **kwargs))
        else:
            after = _first_tensor(self.forward(**{**kwargs, "hidden_states": changed}))
        assert after is not None
        wanted = before[:, self.boundary :].float()
        moved = (after[:, self.boundary :].float() - wanted).norm(dim=-1)
        self.mixes |= bool((moved / wanted.norm(dim=-1).clamp_min(1e-12)).amax() > MIXES)
        return output


def _sliced(value: object, part: slice, tokens: int) -> object:
    """A sample's part of whatever has tokens: (1, S, ...), (S,), or a mask (B, 1, S, S)."""
    if isinstance(value, tuple):
        return tuple(_sliced(item, part, tokens) for item in value)
    if isinstance(value, Tensor):
        if value.ndim > 1 and value.shape[:2] == (1, tokens):
            return value[:, part]
        if value.shape == (tokens,):
            return value[part]
        if value.ndim == 4 and value.shape[-2:] == (tokens, tokens):
            return value[..., part, part]
    return value


def _joined(outputs: Sequence[object]) -> object:
    """The outputs of all samples as one: (1, S, D) along the tokens, tuples item by item.

    Other tensors, such as the weights of eager attention, belong to one sample and are left out.
    """
    first = outputs[0]
    if isinstance(first, tuple):
        parts = [output for output in outputs if isinstance(output, tuple)]
        return tuple(_joined(items) for items in zip(*parts, strict=True))
    if isinstance(first, Tensor):
        tensors = [output for output in outputs if isinstance(output, Tensor)]
        return torch.cat(tensors, dim=1) if first.ndim == 3 else None
    return first


def _first_tensor(output: object) -> Tensor | None:
    if isinstance(output, tuple) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None
