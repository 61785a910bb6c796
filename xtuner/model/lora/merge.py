"""A part of a model with its adapter merged, the part itself left as it is."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer


def merged_copy(part: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of a part with its adapter merged; the part itself where it has none.

    Args:
        part: a transformers or peft model.
        dtype: of the merged layers, which are computed in fp32; their own when None.

    Raises:
        UserError: when its weights are quantised: merging would round them once more.
    """
    if not hasattr(part, "peft_config"):
        return part
    if getattr(part.get_base_model(), "is_quantized", False):
        raise UserError(
            tr("an adapter on quantised weights is not merged here"),
            hint=tr("'xtuner convert pth_to_hf' loads the base without quantisation for this."),
        )
    from peft.tuners.tuners_utils import BaseTunerLayer

    copied = copy.deepcopy(part)
    for layer in copied.modules():
        if isinstance(layer, BaseTunerLayer):
            merge = functools.partial(merge_in_fp32, layer, dtype)
            setattr(layer, "merge", merge)  # noqa: B010
    return copied.merge_and_unload()


def merge_in_fp32(
    layer: BaseTunerLayer,
    dtype: torch.dtype | None = None,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> None:
    """Replace ``merge`` of one layer, for one call: the sum is rounded once.

    Args:
        layer: of an adapter; its ``merge`` was set to a call of this function.
        dtype: of its weights afterwards; their own when None.
        safe_merge: as ``merge``.
        adapter_names: as ``merge``.
    """
    delattr(layer, "merge")
    parameters = {
        key: parameter
        for key, parameter in layer.get_base_layer().named_parameters(recurse=False)
        if parameter.is_floating_point()
    }
    dtypes = {key: dtype or parameter.dtype for key, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    for key, parameter in parameters.items():
        parameter.data = parameter.data.to(dtypes[key])
