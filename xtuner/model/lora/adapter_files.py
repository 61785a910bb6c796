"""Adapters in files: what peft reads wrong, or not at all.

transformers renames weights of some models when it reads them, and peft renames an adapter's
tensors by the same rules, even where they have the names of the modules already. A rule that fits
both (``k_sconv.weight_proj`` of Inkling 2, ``language_model`` of Unlimited-OCR) sends them to
modules that do not exist; peft warns, and leaves these layers without their adapter.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER = "default"
LACKS = "Found missing adapter keys"
"""How peft's warning of layers without tensors begins."""


def load_adapter(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    is_trainable: bool = False,
    partial: bool = False,
) -> PeftModel:
    """Put an adapter on its base, all of it.

    Args:
        model: the base.
        folder: the adapter's.
        is_trainable: whether its training is continued.
        partial: whether layers may have no tensors: those of a visual encoder that no image
            reaches are not trained, and not written.

    Raises:
        UserError: when layers stay without their tensors.
    """
    from peft import PeftModel
    from peft.utils.save_and_load import load_peft_weights

    path = os.fspath(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", LACKS)
        wrapped = PeftModel.from_pretrained(model, path, is_trainable=is_trainable)
    lacks = [str(each.message).startswith(LACKS) for each in caught]
    for each, known in zip(caught, lacks, strict=True):
        if not known:
            warnings.showwarning(each.message, each.category, each.filename, each.lineno)
    if any(lacks) and not partial:
        # only a further reading names them: nearly always the file is read once
        result = wrapped.load_adapter(path, ADAPTER, is_trainable=is_trainable)
        missing = list(result.missing_keys)
        _copy_missing(wrapped, missing, load_peft_weights(path, device="cpu"), path)
    return wrapped


def _copy_missing(
    wrapped: PeftModel, missing: list[str], tensors: Mapping[str, Tensor], folder: str
) -> None:
    own: Any = dict(wrapped.named_parameters())
    found = {name: tensors.get(name.replace(f".{ADAPTER}", "", 1)) for name in missing}
    absent = [
        name for name, tensor in found.items() if tensor is None or own[name].shape != tensor.shape
    ]
    if absent:
        raise UserError(
            tr("the adapter lacks tensors: {missing}", missing=", ".join(absent[:3])),
            hint=tr("convert it again, or check 'target_modules'."),
            where=Where(folder),
        )
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)


def layers_lost_by_peft(wrapped: PeftModel) -> list[str]:
    """Names of the layers whose adapter peft alone would not find in a file.

    Args:
        wrapped: a model with its adapter, which may be on the meta device.
    """
    from peft import get_peft_model_state_dict
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers,
    )

    tensors = {name: t for name, t in get_peft_model_state_dict(wrapped).items() if "lora_" in name}
    config = wrapped.peft_config[ADAPTER]
    read = convert_peft_adapter_state_dict_for_transformers(wrapped, config, tensors, ADAPTER)
    names = {name.replace(f".{ADAPTER}", "", 1) for name in read}
    lost = {name.partition(".lora_")[0] for name in tensors.keys() - names}
    return sorted(name.removeprefix("base_model.model.") for name in lost)
