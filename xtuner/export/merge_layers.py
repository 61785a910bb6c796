"""Merging an adapter into a model in memory, layer by layer, each in fp32."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from xtuner.export.streaming_merge import ADAPTER
from xtuner.export.verify import check_weights
from xtuner.export.verify_streamed import adds_product, lora_product
from xtuner.model.lora.merge import merge_in_fp32

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel


def merge_layers(wrapped: PeftModel, *, check: bool) -> PreTrainedModel:
    """Merge an adapter by peft, each layer in fp32 and then rounded to the dtype of its base.

    Args:
        wrapped: base and adapter; the base is changed.
        check: compare the layers of plain LoRA with base + product, which peft did not compute.

    Returns:
        The base.

    Raises:
        UserError: naming the layer that is not base + adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    settings = wrapped.peft_config[ADAPTER]
    for name, module in wrapped.named_modules():
        if isinstance(module, BaseTunerLayer):
            _replace_merge(name, module, check and adds_product(settings, module))
    merged: PreTrainedModel = wrapped.merge_and_unload(safe_merge=True)
    return merged


def _replace_merge(name: str, layer: BaseTunerLayer, compares: bool) -> None:
    setattr(layer, "merge", functools.partial(_merge, name, layer, compares))  # noqa: B010


def _merge(
    name: str,
    layer: BaseTunerLayer,
    compares: bool,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> None:
    """Replace ``merge`` of one layer, for one call."""
    weight = dict(layer.get_base_layer().named_parameters(recurse=False)).get("weight")
    # not of experts, which are one tensor
    compares = compares and weight is not None and weight.is_floating_point()
    before = weight.detach().clone() if compares and weight is not None else None
    merge_in_fp32(layer, None, safe_merge, adapter_names)
    product = lora_product(layer) if compares else None
    if before is not None and product is not None and weight is not None:
        exact = {name: before.float() + product.to(before.device)}
        check_weights(exact, {name: weight.detach()}, before.dtype, {name: before})
