"""The shape of a projector, as a transformers config."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class ProjectorConfig(PretrainedConfig):
    """Linear layers with an activation in between.

    Args:
        visual_hidden_size: width of the visual features.
        llm_hidden_size: width of the language model.
        depth: linear layers.
        hidden_act: activation between them, by transformers' name.
        bias: whether the layers have one.
        **kwargs: of every transformers config.
    """

    model_type = "projector"

    def __init__(
        self,
        visual_hidden_size: int = 4096,
        llm_hidden_size: int = 4096,
        depth: int = 2,
        hidden_act: str = "gelu",
        bias: bool = True,
        **kwargs: Any,
    ) -> None:
        self.visual_hidden_size = visual_hidden_size
        self.llm_hidden_size = llm_hidden_size
        self.depth = depth
        self.hidden_act = hidden_act
        self.bias = bias
        super().__init__(**kwargs)
