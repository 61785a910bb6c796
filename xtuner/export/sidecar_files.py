"""What lies beside exported weights: the tokenizer with its template, and whose adapter it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xtuner.export.fingerprint import write_fingerprint
from xtuner.export.model_folder import find_model, read_json, update_json
from xtuner.export.trained_template import put_template, write_stop_tokens
from xtuner.export.weights import Weights
from xtuner.utils.constants import REWARD_FILE
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr


def write_tokenizer(folder: Path, tokenizer: Any, template: Mapping[str, Any] | None) -> None:
    """Write a tokenizer, with a prompt template as its chat template, and that one's stop tokens.

    Args:
        folder: of the exported model or adapter.
        tokenizer: of the run; its chat template is replaced when there is a template.
        template: the fields of a ``PROMPT_TEMPLATE``; None leaves the tokenizer as it is.
    """
    if template is not None:
        put_template(tokenizer, template)
        write_stop_tokens(folder, tokenizer, template)
    tokenizer.save_pretrained(folder)
    _rename_special_tokens(folder, tokenizer)


def _rename_special_tokens(folder: Path, tokenizer: Any) -> None:
    """Bring the base's ``special_tokens_map.json`` up to date, which outranks what is saved now."""
    file = folder / "special_tokens_map.json"
    before = read_json(file)
    after = {
        name: text
        for name, text in tokenizer.special_tokens_map.items()
        if name in before and isinstance(text, str) and text != _content(before[name])
    }
    if after:
        update_json(file, **after)


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def write_reward_token(folder: Path, token: int) -> None:
    """Write which token ends the texts that a reward model judges."""
    (folder / REWARD_FILE).write_text(json.dumps({"reward_token_id": token}) + "\n", "utf-8")
    config = folder / "config.json"
    if "reward_token_id" in read_json(config):  # a class that looks for the token by itself
        update_json(config, reward_token_id=token)


def write_base(folder: Path, base_name: str) -> None:
    """Write the fingerprint of the base that an adapter was trained on; say when there is none."""
    try:
        write_fingerprint(folder, base_name, Weights(find_model(base_name)))
    except UserError as error:
        print(tr("the base has no fingerprint in the adapter: {message}", message=error.message))
