"""What was written, compared with what another program reads: the class that the base names.

Servers build the class of the base's ``config.json`` and look an adapter's tensors up by their
names in it. An adapter that was trained on the class of the language model alone has shorter names
there, and vLLM loads it without a word and answers as the base does (vLLM #34186, #39369, #48019).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xtuner.export.model_folder import read_adapter_config, read_json, update_json
from xtuner.export.streaming_merge import attach_adapter, read_adapter
from xtuner.export.untrained import class_name
from xtuner.export.weights import Weights, shown
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRANSFORMERS = "transformers"
SERVERS = {"vllm": "vLLM", "sglang": "SGLang", "lmdeploy": "LMDeploy"}
READERS = (TRANSFORMERS, *SERVERS)
PREFIX = "base_model.model."
HEAD = "lm_head.weight"
_TENSOR = re.compile(r"(?P<module>.+)\.(lora_[AB]\.weight|lora_embedding_[AB])")
_NOT_SERVED = (
    "use_dora", "modules_to_save", "target_parameters", "rank_pattern", "alpha_pattern",
    "trainable_token_indices", "layer_replication", "lora_bias",
)  # fmt: skip
"""Settings of ``adapter_config.json`` beyond plain LoRA, which servers refuse or leave out."""


def fit_adapter(adapter: Path, base: Path, reader: str) -> bool:
    """Give an adapter's tensors the names that they have in the class that its base names.

    Args:
        adapter: the adapter's folder, which is changed.
        base: the base's folder.
        reader: one of ``READERS``; nothing is done for transformers.

    Returns:
        Whether names were changed.

    Raises:
        UserError: when the reader would not apply the adapter, with the reason.
    """

    if reader == TRANSFORMERS:
        return False
    settings = read_json(adapter / "adapter_config.json")
    tensors = read_adapter(adapter)
    _require_plain_lora(settings, tensors, SERVERS[reader], adapter)
    model = build_named_class(base)
    modules = {name: match["module"] for name in tensors if (match := _match(name))}
    rename = _find_names(model, set(modules.values()), adapter)
    changed = {
        name: name.replace(PREFIX + own, PREFIX + rename(own), 1) for name, own in modules.items()
    }
    renamed = any(name != new for name, new in changed.items())
    if renamed:
        _write(adapter, {changed[name]: tensor for name, tensor in tensors.items()})
        adapted = {rename(own) for own in modules.values()}
        update_json(adapter / "adapter_config.json", **_targets(model, adapted))
    attach_adapter(model, read_adapter_config(adapter), adapter)
    return renamed


def check_model(folder: Path, base: Path, reader: str) -> None:
    """Check that a written model has the class and the tensors of its base.

    Args:
        folder: what was written.
        base: the base's folder.
        reader: one of ``READERS``; nothing is checked for transformers.

    Raises:
        UserError: when the class or the names of tensors differ.
    """
    if reader == TRANSFORMERS:
        return
    before, after = class_name(base), class_name(folder)
    if before != after:
        raise UserError(
            tr(
                "{reader} would read this model as {after}, but its base is {before}",
                reader=SERVERS[reader],
                after=after,
                before=before,
            ),
            hint=_as_transformers(),
        )
    wanted, found = _tensor_names(base), _tensor_names(folder)
    differing = sorted((wanted ^ found) - {HEAD})  # which may be tied on one side
    if differing:
        raise UserError(
            tr(
                "the tensors of this model are named otherwise than those of its base, so that "
                "{reader} may not find them: {names}",
                reader=SERVERS[reader],
                names=shown(differing, 4),
            ),
            hint=_as_transformers(),
        )


def build_named_class(base: Path) -> PreTrainedModel:
    """Build the class that a folder's ``config.json`` names, on the meta device.

    Raises:
        UserError: when neither transformers nor XTuner has it.
    """
    import transformers

    from xtuner.model.transformers_models.auto import AutoConfig, AutoModelForCausalLM

    name = class_name(base)
    owner: Any = getattr(transformers, name, None)
    config: Any = None
    if owner is not None or "auto_map" not in read_json(base / "config.json"):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # names are those of the class before quantisation
    with torch.device("meta"):
        if owner is not None:
            model: PreTrainedModel = owner._from_config(config)
            return model
        other: Any = AutoModelForCausalLM.from_config(config) if config is not None else None
    if type(other).__name__ != name:
        raise UserError(
            tr(
                "the class {name} is not known here, so names cannot be compared with it", name=name
            ),
            hint=_as_transformers(),
            where=Where(str(base / "config.json")),
        )
    return other


def _require_plain_lora(
    settings: Mapping[str, Any], names: Collection[str], reader: str, adapter: Path
) -> None:
    kind = settings.get("peft_type")
    beyond = [] if kind == "LORA" else [f"peft_type={kind}"]
    beyond += [name for name in _NOT_SERVED if settings.get(name)]
    if settings.get("bias", "none") != "none":
        beyond.append("bias")
    if any(".experts." in name for name in names):
        beyond.append("experts")
    beyond += [name for name in names if not _match(name)]
    if beyond:
        raise UserError(
            tr(
                "{reader} is not known to apply what this adapter has beyond plain LoRA: {names}",
                reader=reader,
                names=shown(beyond, 4),
            ),
            hint=tr("convert it without --for, merge it into its base, and serve the result."),
            where=Where(str(adapter)),
        )


def _match(name: str) -> re.Match[str] | None:
    return _TENSOR.fullmatch(name.removeprefix(PREFIX))


def _find_names(model: PreTrainedModel, adapted: set[str], adapter: Path) -> Callable[[str], str]:
    """Find what modules of the language model's class are called in the folder's class."""
    from xtuner.model.lora.targets import towers

    outside = tuple(f"{tower}." for tower in towers(model))
    known = {name for name, _ in model.named_modules() if not name.startswith(outside)}
    unknown = sorted(adapted - known)
    if not unknown:
        return lambda name: name
    own = f"{unknown[0].partition('.')[0]}."
    rest = unknown[0].removeprefix(own)
    found = [
        prefix
        for prefix in (name.removesuffix(rest) for name in known if name.endswith(f".{rest}"))
        if all(prefix + name.removeprefix(own) in known for name in unknown if name.startswith(own))
    ]
    if len(found) != 1 or any(not name.startswith(own) for name in unknown):
        raise UserError(
            tr(
                "{model} has no modules for these of the adapter: {names}",
                model=type(model).__name__,
                names=shown(unknown, 4),
            ),
            hint=_as_transformers(),
            where=Where(str(adapter)),
        )

    def rename(name: str) -> str:
        return name if name in known else found[0] + name.removeprefix(own)

    return rename


def _targets(model: PreTrainedModel, adapted: set[str]) -> dict[str, Any]:
    """Settings of ``adapter_config.json`` that choose these modules of a model and no others."""
    from xtuner.model.lora.targets import last_name, name_pattern

    targets = {last_name(name) for name in adapted}
    others = [
        name
        for name, _ in model.named_modules()
        if name not in adapted
        and any(name == each or name.endswith(f".{each}") for each in targets)
    ]
    patterns = {name_pattern(name) for name in others}
    if any(re.fullmatch(pattern, name) for pattern in patterns for name in adapted):
        patterns = {re.escape(name) for name in others}
    settings = dict.fromkeys(("layers_to_transform", "layers_pattern"))
    return {
        **settings,
        "target_modules": sorted(targets),
        "exclude_modules": "|".join(sorted(patterns)) or None,
    }


def _write(adapter: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    file = adapter / "adapter_model.safetensors"
    if file.is_file():
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        torch.save(tensors, adapter / "adapter_model.bin")


def _tensor_names(folder: Path) -> set[str]:
    """The names of a folder's tensors, without the parts that quantised ones are stored in."""
    names = set(Weights(folder).infos)
    return {
        name
        for name in names
        if not any(name[: dot.start()] in names for dot in re.finditer(r"\.", name))
    }


def _as_transformers() -> str:
    return tr("without --for it is written for transformers and peft.")
