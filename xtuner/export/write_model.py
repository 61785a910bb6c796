"""Writing trained weights as a Hugging Face model, a tensor at a time, or as a peft adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch

from xtuner.export.model_folder import find_model
from xtuner.export.shards import ShardWriter
from xtuner.export.sidecar_files import write_base_fingerprint
from xtuner.export.trained_weights import TrainedWeights
from xtuner.export.untrained import find_untrained
from xtuner.export.verify import StoredWeights
from xtuner.export.weights import TensorInfo
from xtuner.utils.files import copy_side_files

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

PREFIX = "llm."


def is_adapter(llm: object) -> TypeGuard[PeftModel]:
    """Whether a model is a base with a peft adapter."""
    from peft import PeftModel

    return isinstance(llm, PeftModel)


def can_stream(meta_model: nn.Module, weights: TrainedWeights) -> bool:
    """Whether a checkpoint can be exported tensor by tensor.

    It must hold one language model, and transformers must not convert its tensors when saving.
    """
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    llm = getattr(meta_model, "llm", None)
    if not all(name.startswith(PREFIX) for name in weights.infos):
        return False
    if is_adapter(llm):
        return True
    if not isinstance(llm, PreTrainedModel):
        return False
    conversions = get_model_conversion_mapping(llm, add_legacy=False)
    return all(isinstance(entry, PrefixChange) for entry in conversions)


def write_full_model(
    llm: PreTrainedModel,
    weights: TrainedWeights,
    out: Path,
    *,
    dtype: torch.dtype | None,
    shard_size: int,
    safe: bool,
    progress: Callable[[int], None],
) -> None:
    """Write a fully trained language model, with the small files of its base.

    Args:
        llm: the model on the meta device.
        weights: its trained weights, names prefixed ``llm.``.
        out: the folder.
        dtype: of the floating-point tensors; as trained when None.
        shard_size: bytes of a shard.
        safe: safetensors, or else ``.bin``.
        progress: called with the bytes of each tensor written.
    """
    tied = set(getattr(llm, "all_tied_weights_keys", None) or {})
    plan = [
        TensorInfo(name.removeprefix(PREFIX), info.shape, _dtype(info.dtype, dtype))
        for name, info in weights.infos.items()
        if name.removeprefix(PREFIX) not in tied
    ]
    untrained: list[TensorInfo] = []
    if llm.name_or_path:  # a model that the config makes itself has no base
        folder = find_model(str(llm.name_or_path))
        copy_side_files(folder, out)
        found = find_untrained(folder, llm, {info.name for info in plan} | tied)
        found.report()
        base, untrained = found.weights, found.copied
    copied = [TensorInfo(info.name, info.shape, _dtype(info.dtype, dtype)) for info in untrained]
    with ShardWriter(out, plan + copied, shard_size, safe) as writer:
        for info in plan:
            writer.write(info.name, weights.read(PREFIX + info.name).to(info.dtype))
            progress(info.nbytes)
        for info in copied:
            writer.write(info.name, base.read(info.name).to(info.dtype))
    main = next(info.dtype for info in plan if info.dtype.is_floating_point)
    llm.config.dtype = main
    llm.config.architectures = [type(llm).__name__]
    llm.config.use_cache = True
    llm.config.save_pretrained(out)
    if llm.generation_config is not None and not (out / "generation_config.json").is_file():
        llm.generation_config.save_pretrained(out)


def trained_tensors(
    llm: PreTrainedModel | PeftModel, weights: TrainedWeights
) -> Mapping[str, torch.Tensor]:
    """The trained weights under the names that they have in the files of a model or an adapter."""
    if is_adapter(llm):
        from peft import get_peft_model_state_dict

        own = {name.removeprefix(PREFIX): tensor for name, tensor in weights.tensors.items()}
        named: dict[str, torch.Tensor] = get_peft_model_state_dict(
            llm, state_dict=own, save_embedding_layers=False
        )
        return named
    tied = set(getattr(llm, "all_tied_weights_keys", None) or {})
    names = {name.removeprefix(PREFIX): name for name in weights.infos}
    return StoredWeights(weights, {own: name for own, name in names.items() if own not in tied})


def write_adapter(
    llm: PeftModel, weights: TrainedWeights, out: Path, *, dtype: torch.dtype | None, safe: bool
) -> None:
    """Write a peft adapter that names its base, and the base's fingerprint.

    Args:
        llm: the model on the meta device, with the adapter.
        weights: the trained weights, names prefixed ``llm.``.
        out: the folder.
        dtype: of the floating-point tensors; as trained when None.
        safe: safetensors, or else ``.bin``.
    """
    from safetensors.torch import save_file

    base_name = str(llm.get_base_model().name_or_path)
    if not base_name:
        find_model(base_name)  # refuses
    tensors = {
        name: tensor.to(_dtype(tensor.dtype, dtype)).clone().contiguous()
        for name, tensor in trained_tensors(llm, weights).items()
    }
    if safe:
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(tensors, out / "adapter_model.bin")
    config = llm.peft_config["default"]
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    config.save_pretrained(str(out))
    write_base_fingerprint(out, base_name)


def _dtype(own: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    return asked if asked is not None and own.is_floating_point else own
