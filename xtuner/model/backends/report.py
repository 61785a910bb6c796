"""Which backend computes what in a model: for the plan of a run and for ``run.json``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xtuner.model.backends import environment
from xtuner.model.backends.case import Case
from xtuner.model.backends.cpu.kernels import Kernel
from xtuner.model.backends.layers import Installed
from xtuner.model.backends.registry import choose
from xtuner.model.modules import attention
from xtuner.model.modules.loss import LOSS_BACKENDS, is_plain_head
from xtuner.utils.lang import tr, translate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Line = tuple[str, str, str]
"""What is computed, by which backend, and why by none that is faster (empty: it is the fastest)."""


def report(
    model: PreTrainedModel,
    installed: Sequence[Installed],
    dtype: torch.dtype,
    *,
    packed: bool,
    separate_head: bool,
) -> list[Line]:
    """Say which backend computes what.

    Args:
        model: a transformers model, with or without peft's layers.
        installed: what was put in when it was built.
        dtype: what matrix products are computed in.
        packed: whether rows are packed.
        separate_head: whether body and head can be called apart.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        device = environment.training_device()
    case = Case(
        device=device.type,
        capability=environment.capability(device),
        dtype=dtype,
        libraries=environment.libraries(),
        compiled=Kernel.compiled,
        distributed=torch.distributed.is_available() and torch.distributed.is_initialized(),
        packed=packed,
        right_padded=True,
        separate_head=separate_head,
        plain_head=is_plain_head(model.get_output_embeddings()),
    )
    lines = list(_attention(model, case))
    loss = choose(LOSS_BACKENDS, case)
    lines.append((tr("loss"), loss.name, loss.reason))
    return [*lines, *(_layers(each, case) for each in installed)]


def packs_in_one_call(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether one kernel computes packed rows of a model here, not sample by sample."""
    if getattr(model.config, "_attn_implementation", None) != attention.NAME:
        return False
    device = next(model.parameters()).device
    case = Case(
        device=device.type,
        capability=environment.capability(device),
        dtype=dtype,
        libraries=environment.libraries(),
    )
    kinds = _kinds_of_attention(model, case)
    return all(attention.packed_choice(each).backend.device is not None for _, each in kinds)


def _attention(model: PreTrainedModel, case: Case) -> Iterator[Line]:
    chosen = getattr(model.config, "_attn_implementation", None)
    if chosen != attention.NAME:
        yield tr("attention"), str(chosen), tr("attn_implementation of the config")
        return
    for name, each in _kinds_of_attention(model, case):
        if case.packed:
            packed = attention.packed_choice(each)
            yield name, packed.name, packed.reason
        else:
            dense = choose(attention.DENSE_BACKENDS, each)
            yield name, dense.name, dense.reason


def _kinds_of_attention(model: PreTrainedModel, case: Case) -> Iterator[tuple[str, Case]]:
    """Layers with and without a sliding window, as the config describes them."""
    config: Any = model.config.get_text_config()
    heads = int(getattr(config, "num_attention_heads", 1))
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "v_head_dim", None) and getattr(config, "qk_nope_head_dim", None):
        qk_width, v_width = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    else:
        qk_width = v_width = width
    scale = getattr(config, "query_pre_attn_scalar", None)
    case = replace(
        case,
        qk_width=qk_width,
        v_width=v_width,
        grouped=heads != (getattr(config, "num_key_value_heads", None) or heads),
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        sinks=has_sinks(model),
        dropout=bool(getattr(config, "attention_dropout", 0.0)),
        scaled=bool(getattr(config, "attention_multiplier", None))
        or (scale is not None and scale != qk_width),
    )
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if kinds:
        sliding, full = "sliding_attention" in kinds, "full_attention" in kinds
    else:
        sliding = bool(window) and getattr(config, "use_sliding_window", True)
        full = not sliding
    if full or not sliding:
        yield tr("attention"), case
    if sliding:
        yield tr("attention, sliding window"), replace(case, sliding_window=True)


def has_sinks(model: nn.Module) -> bool:
    """Whether layers of a model have attention sinks."""
    return any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters())


def _layers(installed: Installed, case: Case) -> Line:
    """What was put in, unless this run's dtype, or kernels not compiled, rule it out."""
    compiled = case.compiled if case.device == "cpu" else installed.case.compiled
    choice = choose(installed.backends, replace(case, compiled=compiled))
    concept = translate(installed.concept)
    if choice.name != installed.name and not installed.reason:
        return concept, choice.name, choice.reason
    return concept, installed.name, installed.reason
