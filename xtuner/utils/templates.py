"""The 26 prompt templates and 8 system templates that published models were trained with.

The texts are data (``prompt_templates.json``) and must stay byte-exact: a model answers well only
in the format it was trained in. ``PROMPT_TEMPLATE.auto`` stands for the tokenizer's own chat
template.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr


class AttrDict(dict[str, Any]):
    """A dict whose keys can be read as attributes, as configuration files do."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"there is no template {name!r}; there are: {', '.join(sorted(self))}"
            ) from None


_TEXTS = json.loads((Path(__file__).parent / "prompt_templates.json").read_text("utf-8"))

AUTO_TEMPLATE = "tokenizer"
"""Value of ``prompt_template`` that stands for the tokenizer's own chat template."""

PROMPT_TEMPLATE = AttrDict(
    {name: AttrDict(fields) for name, fields in _TEXTS["prompt_template"].items()},
    auto=AUTO_TEMPLATE,
)
SYSTEM_TEMPLATE = AttrDict(_TEXTS["system_template"])


def template_named(name: str) -> Any:
    """A prompt template by its name.

    Args:
        name: such as ``qwen_chat``, or with its module: ``xtuner.utils.PROMPT_TEMPLATE.qwen_chat``.

    Raises:
        UserError: where there is none of this name.
    """
    if name == AUTO_TEMPLATE:
        return AUTO_TEMPLATE
    module, _, last = name.rpartition(".PROMPT_TEMPLATE.")
    try:
        return (importlib.import_module(module).PROMPT_TEMPLATE if module else PROMPT_TEMPLATE)[
            last
        ]
    except (ImportError, AttributeError, KeyError) as error:
        raise UserError(
            tr("there is no prompt template {name!r}", name=name),
            hint=tr("one of: {names}", names=", ".join(sorted(PROMPT_TEMPLATE))),
        ) from error
