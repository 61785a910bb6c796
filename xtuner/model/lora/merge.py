"""A part of a model with its adapter merged, the part itself left as it is."""

from __future__ import annotations

import copy
from typing import Any

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr


def merged_copy(part: Any) -> Any:
    """A copy of a part with its adapter merged; the part itself where it has none.

    Args:
        part: a transformers or peft model.

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
    return copy.deepcopy(part).merge_and_unload()
