"""Recompute activations in the backward pass instead of storing them.

What a layer is recomputed from, its input, may be kept in main memory. Both settings have the names
of transformers, whose releases before 5.23 do not have them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from xtuner.model.input_offload import InputOffload
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

KEY = "model.use_activation_checkpointing"


@dataclass(frozen=True)
class Checkpointing:
    """Which layers are recomputed, and from where.

    Args:
        every_n_layers: the first of so many layers is recomputed; the others store their
            activations.
        offload: keep the inputs of these layers in pinned main memory (``input_offload.py``).
    """

    every_n_layers: int = 1
    offload: bool = False

    @classmethod
    def of(cls, setting: bool | Mapping[str, Any] | None) -> Checkpointing | None:
        """What a config's ``use_activation_checkpointing`` means; None where nothing is recomputed.

        Raises:
            UserError: for a mapping with other names or values.
        """
        if not isinstance(setting, Mapping):
            return cls() if setting else None
        names = {field.name for field in fields(cls)}
        every_n_layers = setting.get("every_n_layers", 1)
        is_number = isinstance(every_n_layers, int) and not isinstance(every_n_layers, bool)
        known = names >= {*setting} and isinstance(setting.get("offload", False), bool)
        if not (known and is_number and every_n_layers >= 1):
            raise UserError(
                tr("use_activation_checkpointing = {value} is not known.", value=dict(setting)),
                hint=tr(
                    "write True, False, or dict(every_n_layers=2, offload=True), either or both."
                ),
                where=Where(key=KEY),
            )
        return cls(**setting)

    @property
    def share(self) -> float:
        """The part of the layers that is recomputed."""
        return 1 / self.every_n_layers


def enable_activation_checkpointing(
    model: Any, setting: bool | Mapping[str, Any] | Checkpointing = True
) -> None:
    """Recompute activations in the backward pass of a transformers model, from now on.

    Classes without support for it recompute their decoder layers all the same.

    Args:
        model: of transformers.
        setting: as ``Checkpointing.of`` takes it.

    Raises:
        UserError: when such a class has no list of decoder layers, as code of model folders may;
            when ``every_n_layers`` is asked of a class that cannot choose among its layers.
    """
    chosen = setting if isinstance(setting, Checkpointing) else Checkpointing.of(setting)
    if chosen is None:
        return
    if not getattr(model, "supports_gradient_checkpointing", True):
        _wrap_layers(model, chosen)
        return
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(settings)
    else:  # its name before transformers 5.2x, and in code of model folders
        model.gradient_checkpointing_enable(settings)
    if hasattr(model, "disable_input_require_grads"):
        # needed by reentrant checkpointing alone; some classes change their embeddings in place
        model.disable_input_require_grads()
    if chosen.every_n_layers > 1:
        _leave_out_layers(model, chosen.every_n_layers)
    if chosen.offload:
        offload = InputOffload()
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                function = module._gradient_checkpointing_func
                module._gradient_checkpointing_func = offload.around(function)


def disable_activation_checkpointing(model: nn.Module) -> None:
    """Keep all activations from now on: undo ``enable_activation_checkpointing``."""
    module: Any
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
        forward = module.__dict__.get("forward")
        if isinstance(forward, functools.partial) and forward.func is _recomputed:
            module.forward = forward.args[1]


def recomputed_share(model: nn.Module) -> float:
    """The part of a model's layers that is recomputed in the backward pass."""
    layers = _checkpointed_layers(model)
    if layers:
        return sum(bool(layer.gradient_checkpointing) for layer in layers) / len(layers)
    return float(any(getattr(m, "gradient_checkpointing", False) for m in model.modules()))


def _checkpointed_layers(model: nn.Module) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def _leave_out_layers(model: nn.Module, every_n_layers: int) -> None:
    layers = _checkpointed_layers(model)
    if not layers:
        raise UserError(
            tr(
                "{name} recomputes all of its layers or none: every_n_layers cannot be set.",
                name=type(model).__name__,
            ),
            hint=tr("set use_activation_checkpointing = True in model."),
            where=Where(key=KEY),
        )
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index % every_n_layers == 0


def _wrap_layers(model: Any, chosen: Checkpointing) -> None:
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise UserError(
            tr("{name} does not support activation checkpointing.", name=type(model).__name__),
            hint=tr("set use_activation_checkpointing = False in model."),
            where=Where(key=KEY),
        )
    function = functools.partial(checkpoint, use_reentrant=False)
    if chosen.offload:
        function = functools.partial(InputOffload().around(checkpoint), use_reentrant=False)
    layer: Any
    for layer in lists[0][:: chosen.every_n_layers]:  # of the outermost
        layer.forward = functools.partial(_recomputed, layer, layer.forward, function)


def _recomputed(
    layer: nn.Module,
    forward: Callable[..., object],
    function: Callable[..., object],
    *args: object,
    **kwargs: Any,
) -> object:
    if not (layer.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return function(forward, *args, **kwargs)
