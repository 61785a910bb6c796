"""The 26 prompt templates and 8 system templates that published models were trained with.

The texts are data (``prompt_templates.json``) and must stay byte-exact: a model answers well only
in the format it was trained in. ``PROMPT_TEMPLATE.auto`` stands for the tokenizer's own chat
template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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
