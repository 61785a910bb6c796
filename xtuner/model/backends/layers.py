"""Backends of a model's layers, put in when the model is built.

Each replaces the ``forward`` of modules that it recognizes by their structure and leaves classes,
names and weights alone. At a call outside its case (another dtype, an adapter that is disabled) the
original forward is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from xtuner.model.backends import environment
from xtuner.model.backends.case import Case
from xtuner.model.backends.cpu.fused_layers import apply_fused_layers
from xtuner.model.backends.cpu.linear import apply_fused_linear
from xtuner.model.backends.cpu.tied_embedding import apply_tied_embedding
from xtuner.model.backends.gpu.liger import apply_liger
from xtuner.model.backends.registry import Backend, choose
from xtuner.model.lora.fast_lora import apply_fused_lora
from xtuner.utils.lang import N_, tr

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Apply: TypeAlias = Callable[["PreTrainedModel"], int]
"""Replaces the forward of modules; returns how many were replaced."""


class Installed(NamedTuple):
    """A backend that a model was built with."""

    concept: str
    """What it computes, a message to be translated."""
    backends: tuple[Backend[Apply], ...]
    """Those it was chosen from."""
    case: Case
    name: str
    modules: int
    """How many modules it computes; 0 for the original."""
    reason: str
    """Why it is not one of those before it."""


def _unsupported_by_compiled(case: Case) -> str | None:
    return None if case.compiled else tr("compile is not True")


def _unsupported_by_liger(case: Case) -> str | None:
    return case.libraries.liger.error or None


def _unsupported_by_fused_linear(case: Case) -> str | None:
    if not case.is_half:
        return tr("it is for mixed precision")
    return None if case.compiled else tr("kernels are not compiled")


def _unsupported_by_fused_lora(case: Case) -> str | None:
    on_gpu = case.device == "cuda" and case.compiled
    return tr("its layers are compiled") if on_gpu else None


def _unsupported_by_tied_embedding(case: Case) -> str | None:
    return tr("several processes train") if case.distributed else None


def _compile_layers(model: PreTrainedModel) -> int:
    from xtuner.model.backends.gpu.compiled import compile_layers

    return compile_layers(model)


def _sum_of_fused_layers(model: PreTrainedModel) -> int:
    return sum(apply_fused_layers(model))


def _backend(
    name: str, supports: Callable[[Case], str | None], apply: Apply, device: str | None = None
) -> Backend[Apply]:
    return Backend(name, supports, lambda case: apply, device)


def _original(name: str) -> Backend[Apply]:
    return Backend(name, lambda case: None, lambda case: lambda model: 0)


LAYERS = (
    _backend("torch.compile", _unsupported_by_compiled, _compile_layers, device="cuda"),
    _backend("liger-kernel", _unsupported_by_liger, apply_liger, device="cuda"),
    _backend("CPU kernels", lambda case: None, _sum_of_fused_layers, device="cpu"),
    _original("transformers"),
)
LINEAR = (
    _backend("CPU kernels", _unsupported_by_fused_linear, apply_fused_linear, device="cpu"),
    _original("torch"),
)
LORA = (
    _backend("fused", _unsupported_by_fused_lora, apply_fused_lora),
    _original("peft"),
)
TIED_EMBEDDING = (
    _backend("CPU kernels", _unsupported_by_tied_embedding, apply_tied_embedding, device="cpu"),
    _original("torch"),
)


def install(model: PreTrainedModel, compiled: bool) -> list[Installed]:
    """Replace the layers of a model by the best backends for this machine.

    Args:
        model: a transformers model, with or without peft's layers; changed in place.
        compiled: whether torch.compile was asked for.

    Returns:
        What was chosen for norms, rotary embedding and MLP, for linear layers, and for LoRA.
    """
    case = _case(compiled)
    # before the length of a run is known, kernels may yet be compiled
    linear_case = Case(device=case.device, compiled=True)
    installed = [
        _install(N_("norms, rotary embedding, MLP"), LAYERS, case, model),
        _install(N_("linear layers"), LINEAR, linear_case, model),
    ]
    if any(hasattr(module, "lora_A") for module in model.modules()):
        installed.append(_install(N_("LoRA"), LORA, case, model))
    return installed


def install_tied_embedding(model: PreTrainedModel) -> list[Installed]:
    """As ``install``, for the embedding of a model whose head is called in every step."""
    found = _install(N_("tied embedding"), TIED_EMBEDDING, _case(False), model)
    return [found] if found.modules else []


def _case(compiled: bool) -> Case:
    device = environment.training_device()
    return Case(
        device=device.type,
        capability=environment.capability(device),
        libraries=environment.libraries(),
        compiled=compiled,
    )


def _install(
    concept: str, backends: Sequence[Backend[Apply]], case: Case, model: PreTrainedModel
) -> Installed:
    """The first backend that supports the case and finds modules to replace."""
    tried, reasons = tuple(backends), []
    while True:
        choice = choose(tried, case)
        count = choice.build()(model)
        reasons += [choice.reason] if choice.reason else []
        if count or choice.backend is backends[-1]:
            return Installed(concept, tuple(backends), case, choice.name, count, "; ".join(reasons))
        reasons.append(f"{choice.name}: {tr('no layer is of its kind')}")
        tried = tried[tried.index(choice.backend) + 1 :]
