"""The projector as a transformers model, so that it is saved and loaded like any other."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from xtuner.model.modules.projector.configuration_projector import ProjectorConfig


class ProjectorModel(PreTrainedModel):
    """``model.0``, activation, ``model.2``, ...: the names of published checkpoints."""

    config_class = ProjectorConfig
    base_model_prefix = "model"
    main_input_name = "features"
    supports_gradient_checkpointing = False

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__(config)
        widths = [config.visual_hidden_size, *[config.llm_hidden_size] * config.depth]
        layers: list[nn.Module] = []
        for number, width in enumerate(widths[:-1]):
            layers += [ACT2FN[config.hidden_act]] if number else []
            layers.append(nn.Linear(width, widths[number + 1], bias=config.bias))
        self.model = nn.Sequential(*layers)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave layers as torch made them: transformers' 0.02 is too narrow for so few."""

    def forward(self, features: Tensor) -> Tensor:
        """(..., visual width) → (..., width of the language model)."""
        projected: Tensor = self.model(features)
        return projected
