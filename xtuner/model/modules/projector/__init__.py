"""The projector from what a visual encoder sees to what a language model reads."""

from xtuner.model.modules.projector.configuration_projector import ProjectorConfig
from xtuner.model.modules.projector.modeling_projector import ProjectorModel
from xtuner.model.transformers_models.auto import AutoConfig, AutoModel

AutoConfig.register("projector", ProjectorConfig, exist_ok=True)
AutoModel.register(ProjectorConfig, ProjectorModel, exist_ok=True)

__all__ = ["ProjectorConfig", "ProjectorModel"]
