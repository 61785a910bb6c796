"""The parts of a vision-language model of transformers, found by its structure.

The visual encoder is what has the vision configuration; the language model is what rows of text
reach; the projector is what is left of the body, and the layers that Qwen and GLM call mergers,
which are the last ones of the encoder.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor, nn

from xtuner.model.lora.targets import not_reached_by_text
from xtuner.model.meta_model import build_meta_model, is_model_loader
from xtuner.model.modules import attention
from xtuner.model.modules.image_rows import arguments
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

Part: TypeAlias = Literal["language_model", "visual_encoder", "projector", "other"]
VISION = "vision"
"""In the name of the configuration of a visual encoder: ``vision_config``."""
SKIPPED = "llm_int8_skip_modules"
"""What bitsandbytes' settings call the modules that are not quantized, in 4 bits, too."""
MERGER = "merger"
"""In the name of the last layers of an encoder, which belong to the projector."""


@dataclass(frozen=True)
class VisionParts:
    """Where the parts of a model are.

    Args:
        visual_encoder: names of its modules, the outermost.
        projector: names of its modules and of single weights, likewise.
        other: names of what images and text do not reach, such as an audio encoder.
    """

    visual_encoder: tuple[str, ...]
    projector: tuple[str, ...]
    other: tuple[str, ...] = ()

    @property
    def of_vision(self) -> tuple[str, ...]:
        """What images reach before the language model."""
        return (*self.visual_encoder, *self.projector)

    def part_of(self, name: str) -> Part:
        """The part that a module or weight belongs to, in a model with or without an adapter."""
        name = plain_name(name)
        if _is_inside(name, self.projector):
            return "projector"
        if _is_inside(name, self.visual_encoder):
            return "visual_encoder"
        return "other" if _is_inside(name, self.other) else "language_model"

    @classmethod
    def of(cls, llm: PreTrainedModel) -> VisionParts:
        """Find the parts of a model.

        Args:
            llm: a class of ``AutoModelForImageTextToText``, with or without layers of peft.

        Raises:
            UserError: when it has no visual encoder.
        """
        encoders = outermost(_with_config(llm, VISION))
        if not encoders or not hasattr(llm.base_model, "get_image_features"):
            raise UserError(
                tr("{name} has no visual encoder.", name=type(llm).__name__),
                hint=tr(
                    "name a vision-language model, or train a text model with SupervisedFinetune."
                ),
                where=Where(key="model.llm"),
            )
        mergers = outermost(
            name
            for name in _module_names(llm)
            if _is_inside(name, encoders) and MERGER in name.rpartition(".")[2]
        )
        others = outermost(_with_config(llm, "audio"))
        body = llm.base_model
        inside = "" if body is llm else f"{llm.base_model_prefix}."
        weights = [inside + name for name, _ in body.named_parameters(recurse=False)]
        left = [
            name
            for name in not_reached_by_text(llm)
            if name.startswith(inside) and not _is_inside(name, (*encoders, *others))
        ]
        return cls(encoders, (*mergers, *left, *weights), others)


def _with_config(llm: PreTrainedModel, kind: str) -> Iterator[str]:
    """Names of the modules that have the configuration of a kind."""
    own = {
        id(getattr(llm.config, name))
        for name in llm.config.sub_configs
        if kind in name and getattr(llm.config, name, None) is not None
    }
    for name, module in llm.named_modules():
        if name and id(getattr(module, "config", None)) in own:
            yield plain_name(name)


def _module_names(llm: PreTrainedModel) -> Iterator[str]:
    return (plain_name(name) for name, _ in llm.named_modules())


def plain_name(name: str) -> str:
    """The name of a module or weight without what peft puts into it."""
    return re.sub(r"^base_model\.model\.|\.original_module\b|\.modules_to_save\.[^.]+", "", name)


def outermost(names: Iterable[str]) -> tuple[str, ...]:
    """Names that are inside no other one; modules come before those that they have."""
    found: list[str] = []
    for name in names:
        if not _is_inside(name, tuple(found)):
            found.append(name)
    return tuple(found)


def _is_inside(name: str, outer: tuple[str, ...]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in outer)


def keep_vision_unquantized(llm: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model whose weights are quantized, but those that images reach first.

    They are few, and rounding them costs more than it saves; and projectors are trained as a whole.

    Args:
        llm: ``dict(type=AutoModelForImageTextToText.from_pretrained, ...)``; what its
            ``llm_int8_skip_modules`` names already is left as it is.
    """
    settings: dict[str, Any] = dict(llm)
    quantization: Any = settings.pop("quantization_config", None)
    named = isinstance(quantization, Mapping)
    skipped = quantization.get(SKIPPED) if named else getattr(quantization, SKIPPED, None)
    loader = settings.get("type")
    loader = getattr(loader, "__wrapped__", loader)  # which a model without weights is made by
    if quantization is None or skipped or not is_model_loader(loader):
        return dict(llm)
    model = build_meta_model(settings)
    parts, head = VisionParts.of(model), model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    names += [*parts.of_vision, *parts.other]
    if named:
        changed: Any = {**quantization, SKIPPED: names}
    else:
        changed = copy.copy(quantization)
        setattr(changed, SKIPPED, names)
    return {**settings, "quantization_config": changed}


def use_attention_in_encoders(llm: PreTrainedModel) -> None:
    """Choose the attention function of the encoders of a model that computes by ours.

    Encoders whose images share a row, told apart by ``cu_seqlens``, compute by ours, too: one call
    for each layer. For other functions their classes split the row, for which the CPU waits for a
    GPU in each layer, and make one call for each image or window. Other encoders compute by
    torch's function, for ours takes the samples of text rows.

    Args:
        llm: a transformers model.
    """
    llm.set_attn_implementation({name: "sdpa" for name in llm.config.sub_configs if VISION in name})
    for module in llm.modules():
        attends = getattr(module, "is_causal", None) is False
        if attends and "cu_seqlens" in arguments(module.forward):
            config: Any = module.config
            config._attn_implementation = attention.PACKED_ENCODER


def add_encoder_targets(
    lora: LoraConfig,
    encoder_lora: LoraConfig,
    llm: PreTrainedModel,
    parts: VisionParts,
    *,
    language_model: bool,
) -> None:
    """Let one adapter have layers of the visual encoder, too, with a rank of their own.

    Args:
        lora: of the language model; changed in place, its targets become full names.
        encoder_lora: of the encoder. Its rank, alpha and targets are taken; all linear layers if it
            names none.
        llm: without an adapter.
        parts: of the model.
        language_model: whether layers of the language model are adapted, too.

    Raises:
        UserError: when the two differ in what one adapter has once, or no layer is found.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    own, wanted = _once(lora), _once(encoder_lora)
    for name, value in wanted.items():
        if value != own[name]:
            raise UserError(
                tr(
                    "lora and visual_encoder_lora are one adapter, and differ in {name}: "
                    "{own} and {value}.",
                    name=name,
                    own=repr(own[name]),
                    value=repr(value),
                ),
                where=Where(key=f"model.visual_encoder_lora.{name}"),
            )
    linear = [name for name, layer in llm.named_modules() if isinstance(layer, nn.Linear)]
    inside = [name for name in linear if parts.part_of(name) == "visual_encoder"]
    if encoder_lora.target_modules not in (None, "all-linear"):
        inside = [name for name in inside if check_target_module_exists(encoder_lora, name)]
    if not inside:
        raise UserError(
            tr("visual_encoder_lora names no layer of the visual encoder."),
            where=Where(key="model.visual_encoder_lora.target_modules"),
        )
    outside: list[str] = []
    if language_model:
        outside = [
            name
            for name, _ in llm.named_modules()
            if parts.part_of(name) == "language_model" and check_target_module_exists(lora, name)
        ]
    lora.target_modules = [*outside, *inside]
    lora.exclude_modules = None
    pattern = "|".join(rf"{re.escape(name)}\..*" for name in parts.visual_encoder)
    lora.rank_pattern = {**(lora.rank_pattern or {}), pattern: encoder_lora.r}
    lora.alpha_pattern = {**(lora.alpha_pattern or {}), pattern: encoder_lora.lora_alpha}


_OF_EACH = frozenset(
    ("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
)
_OF_THE_WHOLE = frozenset(("task_type", "modules_to_save", "base_model_name_or_path", "revision"))


def _once(lora: LoraConfig) -> Mapping[str, Any]:
    """The fields that hold for all layers of an adapter."""
    fields = copy.copy(vars(lora))
    return {
        name: value
        for name, value in fields.items()
        if name not in _OF_EACH | _OF_THE_WHOLE and not name.startswith("_")
    }


def modules_to_save(llm: PreTrainedModel, names: tuple[str, ...]) -> list[str]:
    """Names of modules that peft can keep a trained copy of; it takes no lists of modules."""
    found: list[str] = []
    for name in names:
        if not _is_module(llm, name):  # a single weight
            continue
        module = llm.get_submodule(name)
        if isinstance(module, nn.ModuleList):
            found += [f"{name}.{index}" for index in range(len(module))]
        else:
            found.append(name)
    return found


def _is_module(llm: nn.Module, name: str) -> bool:
    parent, _, last = name.rpartition(".")
    return last in llm.get_submodule(parent)._modules


def trained_by(output: Tensor) -> set[int]:
    """Ids of the weights that a tensor was computed from, and that need a gradient."""
    found, seen = set(), set()
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [before for before, _ in node.next_functions]
    return found
