"""Classes that load reward models: those of transformers with images, and those of the hub's code.

The hub's have a head ``v_head`` beside the body.
"""

from __future__ import annotations

import inspect
from typing import Any

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

HUB_CLASSES = {"internlm2": "InternLM2ForRewardModel"}
"""By ``model_type``."""
AUTO_MAPS = {
    "InternLM2ForRewardModel": {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModel": "modeling_internlm2.InternLM2ForRewardModel",
    }
}
"""Their classes in the code of the hub's folders."""
HEAD, HUB_HEAD = "score", "v_head"
"""The head's name in transformers' sequence classifiers, and in the hub's classes."""


def require_image_classifier(config: Any) -> None:
    """Refuse a vision-language model whose reward model no class of transformers could load.

    Args:
        config: of the model.

    Raises:
        UserError: with the families that can be trained.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as SEEING

    if _has_classifier(type(config)):
        return
    families = sorted(kind.model_type for kind in SEEING if _has_classifier(kind))
    raise UserError(
        tr(
            "transformers has no class for a reward model of {kind} with images.",
            kind=config.model_type,
        ),
        hint=tr(
            "it has one for: {families}. With the others, train DPO or ORPO on the pairs.",
            families=", ".join(families),
        ),
        where=Where(key="model.llm"),
    )


def _has_classifier(kind: Any) -> bool:
    """Whether transformers has a sequence classifier that takes images for a config's class."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS

    if kind not in CLASSIFIERS or getattr(kind, "is_encoder_decoder", False):
        return False
    classifier: Any = CLASSIFIERS[kind]
    return "pixel_values" in inspect.signature(classifier.forward).parameters


def hub_settings(model_type: str, reward_token_id: int | None) -> dict[str, Any]:
    """The fields of ``config.json`` that make a reward model one of the hub's class.

    Args:
        model_type: of the model; where the hub has no class for it, there are no fields.
        reward_token_id: the token at which a reward is read; None if it is not known yet.
    """
    name = HUB_CLASSES.get(model_type)
    if name is None:
        return {}
    return {
        "architectures": [name],
        "auto_map": AUTO_MAPS[name],
        "reward_token_id": reward_token_id,
    }
