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
            tr(
                "an adapter on quantised weights is not merged here",
                "不能在这里合并量化权重上的适配器",
            ),
            hint=tr(
                "convert with the quantisation switched off: "
                "--cfg-options model.quantization_llm=False or model.llm.quantization_config=None.",
                "请关闭量化再转换: --cfg-options model.quantization_llm=False 或 "
                "model.llm.quantization_config=None。",
            ),
        )
    return copy.deepcopy(part).merge_and_unload()
