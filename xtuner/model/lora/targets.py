"""Which linear layers get an adapter where a config does not say: all but heads, routers, experts.

``target_modules="all-linear"`` of peft also takes the routers of mixtures of experts, turns fused
expert tensors into ``target_parameters`` (which cannot have ``lora_dropout``, and keep the experts
out of 4 bits), and takes layers that peft itself refuses. So the layers are chosen here, by the
structure of the model.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from peft import LoraConfig

EXPERTS = "experts"
"""What transformers calls the experts of a layer, a module of fused tensors or a list."""
EXPERT_LINEARS = frozenset({"w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"})
"""Linear layers of an MLP. In models with fused experts peft takes the names for the experts'."""
NOT_ADAPTED_BY_PEFT = frozenset({"out_proj", "conv1d"})
"""Of layers that peft refuses in models with Mamba mixers (``check_lora_target_modules``)."""
NOT_CALLED = frozenset({"dt_proj", "correction_coefs"})
"""Layers of Mamba mixers and Gemma 3n whose weight is used without them: an adapter would do
nothing."""
MAMBA_TYPES = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})


BESIDE_LANGUAGE_MODEL = frozenset(
    name + norm
    for name in ("encoder_attn", "crossattention", "cross_attn", "pooler", "indexer")
    for norm in ("", "_layer_norm")
) | {"image_encoder", "visual_projection", "embed_tokens_extend", "patcher"}
"""Of decoders of encoder-decoder models, of encoders with a head, of sparse attention; and of
models whose configuration has no part for the language model (GIT, Phi-4-multimodal, BLT)."""


@dataclass(frozen=True)
class LoraTargets:
    """Layers to adapt, as ``LoraConfig`` takes them.

    Args:
        target_modules: last names of layers, for example ``q_proj``.
        exclude_modules: a regular expression for layers of such a name that get no adapter, or
            None where there are none.
    """

    target_modules: list[str]
    exclude_modules: str | None


def set_default_targets(lora: LoraConfig, llm: PreTrainedModel) -> None:
    """Fill in the layers that get an adapter where a config names none, or says ``all-linear``.

    Parts that rows of text do not reach get none, whatever the config names.

    Args:
        lora: changed in place.
        llm: a transformers model without an adapter.
    """
    if lora.target_modules is None or lora.target_modules == "all-linear":
        targets = default_targets(llm)
        lora.target_modules = targets.target_modules
        if targets.exclude_modules and not lora.exclude_modules:
            lora.exclude_modules = targets.exclude_modules
    unreached = [rf"{re.escape(name)}(\..*)?" for name in not_reached_by_text(llm)]
    if unreached:
        lora.exclude_modules = "|".join([*_as_patterns(lora.exclude_modules), *unreached])


def not_reached_by_text(llm: PreTrainedModel) -> list[str]:
    """Names of the parts of a multimodal model that rows of text do not reach, the outermost.

    Vision and audio towers and their projectors, attention to an encoder's states, poolers, and
    indexers, which only select keys: they get no gradient from text, for which several processes
    would wait.
    """
    beside = [
        name for name, _ in llm.named_modules() if name.rpartition(".")[2] in BESIDE_LANGUAGE_MODEL
    ]
    return [*_unreached_towers(llm), *beside]


def _unreached_towers(llm: PreTrainedModel) -> list[str]:
    if llm.config.get_text_config() is llm.config:
        return []
    parts = (llm.get_decoder(), llm.get_input_embeddings(), llm.get_output_embeddings())
    reached = {id(weight) for part in parts if part is not None for weight in part.parameters()}
    body = llm.base_model
    found: list[str] = []
    for name, module in llm.named_modules():
        inside = f"{llm.base_model_prefix}." if body is not llm else ""
        weights = [id(weight) for weight in module.parameters()]
        is_new = not any(name.startswith(f"{outer}.") for outer in found)
        if name.startswith(inside) and name and weights and is_new and not reached & {*weights}:
            found.append(name)
    return found


def _as_patterns(exclude_modules: str | list[str] | None) -> list[str]:
    """``exclude_modules`` of peft as regular expressions for the whole name of a module."""
    if exclude_modules is None or isinstance(exclude_modules, str):
        return [exclude_modules] if exclude_modules else []
    return [rf"(.*\.)?{re.escape(name)}" for name in exclude_modules]


def default_targets(llm: PreTrainedModel) -> LoraTargets:
    """Choose the layers that get an adapter.

    Args:
        llm: a transformers model without an adapter.

    Returns:
        All linear layers except the head, routers, experts, vision and audio towers, and what peft
        refuses. In a model with fused experts the layers of its other MLPs are left out, too: peft
        would put adapters on the experts in their place.
    """
    head = llm.get_output_embeddings()
    inside = tuple(f"{tower}." for tower in towers(llm))
    is_fused = any(_is_fused_expert(module) for module in llm.modules())
    taken: set[str] = set()
    left: list[str] = []
    for name, layer in llm.named_modules():
        if not isinstance(layer, nn.Linear | Conv1D) or layer is head:
            continue
        parts = name.split(".")
        last = last_name(name)
        is_left = (
            EXPERTS in parts
            or (is_fused and parts[-1] in EXPERT_LINEARS)
            or _is_router(llm, name)
            or name.startswith(inside)
            or (llm.config.model_type in MAMBA_TYPES and parts[-1] in NOT_ADAPTED_BY_PEFT)
            or parts[-1] in NOT_CALLED
        )
        if is_left:
            left.append(name)
        else:
            taken.add(last)
    excluded = sorted({name_pattern(name) for name in left if last_name(name) in taken})
    return LoraTargets(sorted(taken), "|".join(excluded) or None)


def adapts_experts(lora: LoraConfig, llm: PreTrainedModel) -> bool:
    """Whether peft puts adapters on expert tensors (``target_parameters``) for these targets."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    converted = copy.deepcopy(lora)
    convert_peft_config_for_transformers(converted, llm, conversions=None)
    return bool(getattr(converted, "target_parameters", None))


def _is_fused_expert(module: nn.Module) -> bool:
    """Whether a module holds all experts of a layer in tensors (experts, out, in)."""
    return "Expert" in type(module).__name__ and any(
        weight.ndim == 3 for weight in module.parameters(recurse=False)
    )


def _is_router(llm: nn.Module, name: str) -> bool:
    """Whether a layer chooses experts: it is called so, or it is a gate next to experts."""
    parts = name.split(".")
    if "router" in parts or "Router" in type(llm.get_submodule(name)).__name__:
        return True
    return any(
        "gate" in part
        and part not in EXPERT_LINEARS
        and hasattr(llm.get_submodule(".".join(parts[:depth])), EXPERTS)
        for depth, part in enumerate(parts)
    )


def towers(llm: PreTrainedModel) -> list[str]:
    """Names of the modules of a multimodal model that text never reaches."""
    text = llm.config.get_text_config()
    if text is llm.config:
        return []
    own = {
        id(value)
        for name, value in vars(llm.config).items()
        if name.endswith("_config") and value is not text and hasattr(value, "model_type")
    }
    return [
        name for name, module in llm.named_modules() if id(getattr(module, "config", None)) in own
    ]


def last_name(name: str) -> str:
    """A layer's last name; with the one before it where it is a number, as in ``ffn.0``."""
    outer, _, last = name.rpartition(".")
    return f"{outer.rpartition('.')[2]}.{last}" if last.isdigit() else last


def name_pattern(name: str) -> str:
    """A layer's name with any number in the place of numbers."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.|$)", r"\\d+", re.escape(name))
