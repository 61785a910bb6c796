"""The optimizer wrapper (autocast, loss scaling, clipping) and the groups of parameters.

It takes the keywords of mmengine's ``AmpOptimWrapper``, and runs on a CPU too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.optim.optimizer.optimizer_wrapper import OptimWrapper

from xtuner.engine import paged_states
from xtuner.utils.dtypes import torch_dtype


class FinetuneOptimWrapper(OptimWrapper):
    """Runs the forward under autocast, scales an fp16 loss, clips, steps.

    The loop decides when to step; this class does not count micro-batches.

    Args:
        optimizer: the optimizer.
        accumulative_counts: micro-batches of one optimizer step, read by the loop.
        clip_grad: keywords of ``torch.nn.utils.clip_grad_norm_`` (``max_norm``, ``norm_type``,
            ``error_if_nonfinite``), or with ``type='value'`` of ``clip_grad_value_``.
        dtype: what matrix products run in, by name; None or ``float32`` for no autocast.
        loss_scale: ``'dynamic'`` or a fixed scale; used for fp16 on a GPU, else ignored.
        device: type of the device the model is on.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        accumulative_counts: int = 1,
        clip_grad: dict[str, Any] | None = None,
        dtype: str | None = None,
        loss_scale: str | float | Mapping[str, Any] = "dynamic",
        device: str = "cpu",
    ) -> None:
        super().__init__(optimizer, accumulative_counts, dict(clip_grad) if clip_grad else None)
        self.dtype = torch_dtype(dtype) if dtype else torch.float32
        self.device = device
        self.scaler: torch.amp.GradScaler | None = None
        self._initial_scale = 1.0
        if self.dtype is torch.float16 and device == "cuda":
            self.set_scaler(loss_scale, device)

    def set_scaler(self, loss_scale: str | float | Mapping[str, Any], device: str) -> None:
        """Scale the loss from now on; arguments as for the class."""
        self.scaler = _scaler(loss_scale, device)
        self._initial_scale = self.scaler.get_scale()

    @property
    def accumulative_counts(self) -> int:
        """Micro-batches of one optimizer step."""
        return self._accumulative_counts

    @contextlib.contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        """The context of a forward: autocast. When gradients are exchanged is up to the loop."""
        enabled = self.dtype is not torch.float32
        dtype = self.dtype if enabled else None
        # On a GPU a cast costs little, and casts that are kept are half of the weights once more.
        kept = self.device != "cuda"
        with torch.autocast(self.device, dtype, enabled=enabled, cache_enabled=kept):
            yield

    def backward(self, loss: torch.Tensor, **kwargs: object) -> None:
        """Add the gradients of ``loss`` (already this micro-batch's share) to those there are."""
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        loss.backward(**kwargs)
        self._inner_count += 1

    def clip(self) -> torch.Tensor:
        """Take the loss scale out of the gradients, clip them and return their norm before that.

        Raises:
            RuntimeError: when the norm is not finite and ``error_if_nonfinite`` is set (never
                under loss scaling, where an overflow now and then is how the scale is found).
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        gradients = [
            parameter.grad
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if not gradients:
            return torch.zeros(())
        limits = dict(self.clip_grad_kwargs or {})
        if limits and self.scaler is not None:
            limits["error_if_nonfinite"] = False
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if limits and self.grad_name == "grad_norm":
            return _full_norm(torch.nn.utils.clip_grad_norm_(parameters, **limits))
        norm = torch.nn.utils.get_total_norm(gradients)
        if limits:
            limits.pop("error_if_nonfinite", None)
            torch.nn.utils.clip_grad_value_(parameters, **limits)
        return _full_norm(norm)

    def step(self, **kwargs: object) -> None:
        """Step the optimizer. Under loss scaling a step whose gradients overflowed is left out."""
        with paged_states.without_waits(self.optimizer):
            if self.scaler is None:
                self.optimizer.step(**kwargs)
                return
            self.scaler.step(self.optimizer, **kwargs)
        self.scaler.update()

    def skip_step(self) -> None:
        """Drop the gradients without a step, ready for the next one."""
        if self.scaler is not None:
            self.scaler.update()  # ends the step that ``unscale_`` began
        self.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and, under ``loss_scaler``, the loss scale."""
        state = paged_states.state_dict(self.optimizer, super().state_dict())
        if self.scaler is not None:
            state["loss_scaler"] = {
                **self.scaler.state_dict(),
                "initial_scale": self._initial_scale,
            }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave.

        How the loss scale moves is the config's; the scale itself is restored, unless the config
        starts from another one than it did.
        """
        state = dict(state_dict)
        saved = state.pop("loss_scaler", None)
        before = (saved or {}).get("initial_scale", self._initial_scale)
        if self.scaler is not None and saved and before == self._initial_scale:
            progress = {name: saved[name] for name in ("scale", "_growth_tracker")}
            self.scaler.load_state_dict({**self.scaler.state_dict(), **progress})
        with paged_states.loading(self.optimizer):
            super().load_state_dict(state)
        _require_shapes(self.optimizer)


def _full_norm(norm: torch.Tensor) -> torch.Tensor:
    """The norm as an ordinary tensor; of weights that FSDP has sharded it is a ``DTensor``."""
    full: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return full


def _scaler(loss_scale: str | float | Mapping[str, Any], device: str) -> torch.amp.GradScaler:
    if isinstance(loss_scale, Mapping):
        return torch.amp.GradScaler(device, **loss_scale)
    if loss_scale == "dynamic":
        return torch.amp.GradScaler(device)
    fixed = float(loss_scale)
    return torch.amp.GradScaler(device, init_scale=fixed, growth_interval=2**31 - 1)


def parameter_groups(
    model: torch.nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    custom_keys: Mapping[str, Mapping[str, float]] | None = None,
    flat_decay_mult: float = 1.0,
) -> list[dict[str, Any]]:
    """Sort what is trained into groups of equal learning rate and weight decay.

    Args:
        model: its parameters that require a gradient are taken.
        lr: the base learning rate; needed where a key has a factor for it.
        weight_decay: the base weight decay, likewise.
        custom_keys: part of a parameter's name -> ``lr_mult`` and ``decay_mult``; the longest
            part that fits a name counts.
        flat_decay_mult: factor on the weight decay of one-dimensional parameters (biases and
            the weights of norms) that no custom key fits; 0 for the usual "no decay".

    Returns:
        Groups for an optimizer, in the order in which their first parameter comes; a setting
        without a factor is left to the optimizer.
    """
    keys = sorted(custom_keys or {}, key=len, reverse=True)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key = next((key for key in keys if key in name), None)
        if key is not None and custom_keys is not None:
            lr_mult = custom_keys[key].get("lr_mult", 1.0)
            decay_mult = custom_keys[key].get("decay_mult", 1.0)
        else:
            lr_mult, decay_mult = 1.0, flat_decay_mult if parameter.ndim <= 1 else 1.0
        group = groups.setdefault((lr_mult, decay_mult), {"params": []})
        group["params"].append(parameter)
        if lr_mult != 1.0 and lr is not None:
            group["lr"] = lr * lr_mult
        if decay_mult != 1.0 and weight_decay is not None:
            group["weight_decay"] = weight_decay * decay_mult
    return list(groups.values())


def _require_shapes(optimizer: torch.optim.Optimizer) -> None:
    """Refuse moments of other shapes than their weights: torch's fused steps do not look.

    Raises:
        ValueError: naming the shapes.
    """
    if not type(optimizer).__module__.startswith("torch.optim"):
        return  # moments of others (GaLore) may be smaller
    for weight, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"):
            moment = state.get(name)
            if isinstance(moment, torch.Tensor) and moment.shape not in (weight.shape, ()):
                raise ValueError(f"{name}: {list(moment.shape)}, {list(weight.shape)}")
