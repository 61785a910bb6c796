"""v0.1's helpers for mixtures of experts whose files name experts otherwise than the model does.

v0.1 had Mixtral and DeepSeek-V2 classes of its own with fused experts. transformers now fuses the
experts of all mixtures when it loads them and splits them when it saves: ``from_pretrained`` and
``save_pretrained`` need no help. These functions do the same for a state dict in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SUPPORT_MODELS = ("DeepseekV2ForCausalLM", "MixtralForCausalLM")
"""The classes that v0.1's helpers knew; here any class that transformers converts will do."""


def get_origin_state_dict(
    state_dict: Mapping[str, Tensor], model: PreTrainedModel
) -> dict[str, Tensor]:
    """Name and split the tensors of a model as its files on the hub do.

    Args:
        state_dict: of ``model``, by the names of its parameters.
        model: decides the conversion.

    Returns:
        For example ``...experts.0.w1.weight`` for each expert, of ``...experts.gate_up_proj``.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(state_dict)))


def load_state_dict_into_model(
    model_to_load: PreTrainedModel, pretrained_state_dict: Mapping[str, Tensor]
) -> list[str]:
    """Load a state dict with the names of the hub's files into a model, in place.

    It takes the memory of a second model; under ZeRO-3, load by ``from_pretrained`` instead.

    Args:
        model_to_load: keeps what the state dict does not have.
        pretrained_state_dict: as in the files on the hub, or as ``get_origin_state_dict`` returns.

    Returns:
        Messages about tensors that are missing or of another shape; empty when all went well.
    """
    loader: Any = type(model_to_load)  # whose result depends on output_loading_info
    converted, info = loader.from_pretrained(
        None,
        config=model_to_load.config,
        state_dict=dict(pretrained_state_dict),
        dtype=model_to_load.dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    missing = set(info["missing_keys"])
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    loaded = {
        name: tensor
        for name, tensor in converted.state_dict().items()
        if name not in missing | mismatched
    }
    model_to_load.load_state_dict(loaded, strict=False)
    return [f"missing: {name}" for name in sorted(missing)] + [
        f"size mismatch: {name}" for name in sorted(mismatched)
    ]
