"""Hugging Face's form of a LLaVA model taken apart again."""

from __future__ import annotations

import os
from typing import Any

import torch

from xtuner.model.modules.projector import ProjectorConfig, ProjectorModel
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr


def read_huggingface(folder: str | os.PathLike[str], dtype: torch.dtype | str = "auto") -> Any:
    """Read a folder of ``LlavaForConditionalGeneration``.

    Args:
        folder: with ``config.json`` and weights.
        dtype: number format of the weights; ``auto``: as they are.

    Returns:
        A ``LLaVAModel`` of the same weights, nothing frozen.

    Raises:
        UserError: when it takes features from several layers.
    """
    from transformers import LlavaForConditionalGeneration

    from xtuner.model.llava import LLaVAModel
    from xtuner.model.transformers_models.auto import AutoModelForCausalLM

    whole: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    config = whole.config
    if not isinstance(config.vision_feature_layer, int):
        raise UserError(
            tr(
                "it takes features from layers {layers}; only one is known",
                layers=config.vision_feature_layer,
            ),
            where=Where(os.fspath(folder), key="vision_feature_layer"),
        )
    with torch.device("meta"):
        llm: Any = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
    setattr(llm, llm.base_model_prefix, whole.model.language_model)
    llm.set_output_embeddings(whole.lm_head)
    llm.generation_config = whole.generation_config
    model = LLaVAModel(
        llm=llm,
        visual_encoder=whole.model.vision_tower,
        visual_select_layer=config.vision_feature_layer,
        use_activation_checkpointing=False,
    )
    model.projector = _projector(whole.model.multi_modal_projector, config)
    return model.eval()


def _projector(theirs: Any, config: Any) -> ProjectorModel:
    projector = ProjectorModel(
        ProjectorConfig(
            visual_hidden_size=theirs.linear_1.in_features,
            llm_hidden_size=theirs.linear_2.out_features,
            hidden_act=config.projector_hidden_act,
            bias=theirs.linear_1.bias is not None,
        )
    ).to(theirs.linear_1.weight.dtype)
    projector.model[0].load_state_dict(theirs.linear_1.state_dict())
    projector.model[2].load_state_dict(theirs.linear_2.state_dict())
    return projector
