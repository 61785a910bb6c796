"""The smallest model that keeps the contract of ``docs/architecture.md`` with the converters."""

from __future__ import annotations

from typing import Any

from peft import get_peft_model
from torch import nn

from xtuner.registry import BUILDER


class ContractModel(nn.Module):
    """An ``llm``, with an adapter where ``lora`` is given; ``state_dict`` holds what is trained."""

    def __init__(self, llm: Any, lora: Any = None) -> None:
        super().__init__()
        self.llm = BUILDER.build(llm)
        self.has_adapter = lora is not None
        if lora is not None:
            self.llm = get_peft_model(self.llm, BUILDER.build(lora))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        marks = ("lora_", "modules_to_save")
        if not self.has_adapter:
            return state
        return {name: value for name, value in state.items() if any(m in name for m in marks)}
