"""The configuration of InternVL."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from xtuner.model.transformers_models.hub_config import HubConfig, without_loading
from xtuner.model.transformers_models.intern_vit.configuration_intern_vit import InternVisionConfig

LONGROPE = "longrope"


class InternVLChatConfig(HubConfig):
    """Settings of an InternVL model, under the names of the hub's ``config.json``.

    Args:
        vision_config: of its InternViT.
        llm_config: of its language model, an InternLM2, Phi-3, Llama, Qwen2 or any other that
            ``AutoConfig`` knows by its ``model_type``.
        select_layer: whose output the image features are; -1 is the last layer.
        downsample_ratio: factor on the sides of the grid of features.
        ps_version: ``v1`` leaves the grid of features transposed, ``v2`` does not.

    Raises:
        ValueError: for adapters of the hub's training code that are not merged.
    """

    model_type = "internvl_chat"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(InternVisionConfig),
        "llm_config": SubConfigSpec(AutoConfig, model_type="internlm2"),
    }

    vision_config: Any = None  # a PreTrainedConfig, once made
    llm_config: Any = None
    use_backbone_lora: int = 0
    use_llm_lora: int = 0
    pad2square: bool = False
    select_layer: int = -1
    force_image_size: int | None = None
    downsample_ratio: float = 0.5
    template: str | None = None
    dynamic_image_size: bool = False
    use_thumbnail: bool = False
    ps_version: str = "v1"
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 6
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        if self.use_backbone_lora or self.use_llm_lora:
            raise ValueError(
                "use_backbone_lora and use_llm_lora must be 0: merge the adapters into the weights"
            )
        for key, spec in self.sub_configs_defaults.items():
            given = getattr(self, key)
            if isinstance(given, dict):
                given = _renamed(without_loading(given))
            made, kwargs = spec.create_subconfig(key, given, **kwargs)
            setattr(self, key, made)
        self.llm_config.tie_word_embeddings = self.tie_word_embeddings
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The fields as the hub's code names them, those of the language model included."""
        fields = super().to_dict()
        fields["llm_config"] = self.hub_fields(fields["llm_config"])
        return fields

    def hub_rope(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The fields for ``rope_parameters``, LongRoPE as Phi-3's first code had it."""
        if parameters["rope_type"] == LONGROPE:
            kept = ("rope_theta", "short_factor", "long_factor")
            parameters = {"rope_type": "su"} | {key: parameters[key] for key in kept}
        return super().hub_rope(parameters)

    def get_text_config(self, *args: object, **kwargs: object) -> PreTrainedConfig:
        """That of the language model."""
        config: PreTrainedConfig = self.llm_config
        return config


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with LongRoPE under its name of today, where Phi-3's first code has ``su``."""
    scaling = fields.get("rope_scaling") or {}
    if scaling.get("type") == "su":
        fields["rope_scaling"] = {**scaling, "type": LONGROPE}
    return fields
