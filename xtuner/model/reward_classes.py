"""Reward models that the hub has a class of its own for: a head ``v_head`` beside the body."""

from __future__ import annotations

from typing import Any

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
