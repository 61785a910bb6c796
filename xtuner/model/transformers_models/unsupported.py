"""Settings of a model's ``config.json`` that our classes do not compute: refused, never ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def refuse_other(config: PreTrainedConfig, **supported: object) -> None:
    """Refuse other values of some settings.

    Args:
        config: the configuration.
        **supported: for each setting the only value that is supported, which is its default.

    Raises:
        UserError: for the first setting with another value; it names both.
    """
    for name, value in supported.items():
        found = getattr(config, name, value)
        if found != value:
            raise UserError(
                tr(
                    "config.json of the model has {name} = {found}; {kind} supports {value} only.",
                    name=name,
                    found=repr(found),
                    kind=type(config).__name__,
                    value=repr(value),
                ),
                hint=tr("use the published weights of this family, in 16 or 32 bits."),
            )
