"""Settings of a model's ``config.json`` that our classes do not compute: refused, never ignored."""

from __future__ import annotations

from typing import Any

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr


def refuse_other(config: Any, **supported: Any) -> None:
    """Refuse other values of some settings.

    Args:
        config: the configuration.
        **supported: for each setting the only value that is supported.

    Raises:
        UserError: for the first setting with another value; it names both.
    """
    for name, value in supported.items():
        found = getattr(config, name)
        if found == value:
            continue
        raise UserError(
            tr(
                f"config.json of the model: {name} is {found!r}, and {type(config).__name__} "
                f"supports {value!r} only.",
                f"模型的 config.json: {name} 为 {found!r}，而 {type(config).__name__} 仅支持 "
                f"{value!r}。",
            ),
            hint=tr(
                "use the model's published weights in 16 or 32 bits.",
                "请使用模型发布的 16 位或 32 位权重。",
            ),
        )
