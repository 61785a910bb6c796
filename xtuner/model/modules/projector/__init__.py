"""The projector from what a visual encoder sees to what a language model reads."""

from transformers import AutoConfig, AutoModel

from xtuner.model.modules.projector.configuration_projector import ProjectorConfig
from xtuner.model.modules.projector.modeling_projector import ProjectorModel

AutoConfig.register("projector", ProjectorConfig, exist_ok=True)
AutoModel.register(ProjectorConfig, ProjectorModel, exist_ok=True)

__all__ = ["ProjectorConfig", "ProjectorModel"]
