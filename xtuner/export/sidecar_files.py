"""The small files beside exported weights: tokenizer, stop tokens, reward token, fingerprint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.export.fingerprint import write_fingerprint
from xtuner.export.model_folder import find_model, read_json, update_json
from xtuner.export.trained_template import set_chat_template, write_stop_tokens
from xtuner.export.weights import Weights
from xtuner.utils.constants import REWARD_FILE
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from xtuner.utils.types import Tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, template: Mapping[str, Any] | None) -> None:
    """Write a tokenizer with a prompt template as its chat template, and the stop tokens of that.

    Args:
        folder: of the exported model or adapter.
        tokenizer: of the run; with a template its chat template is replaced.
        template: the fields of a ``PROMPT_TEMPLATE``; None leaves the tokenizer unchanged, and
            the stop tokens are those of its own chat template.
    """
    if template is not None:
        set_chat_template(tokenizer, template)
    write_stop_tokens(folder, tokenizer, template)
    tokenizer.save_pretrained(folder)
    _rename_special_tokens(folder, tokenizer)


def write_processor(folder: Path, processor: ProcessorMixin) -> None:
    """Write a processor for images and text, its tokenizer included.

    Args:
        folder: of the exported model or adapter.
        processor: of the run. Its image processor is written a second time, as the file that
            transformers 4 and programs that serve models read.
    """
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)


def _rename_special_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    """Update the base's ``special_tokens_map.json``, which takes precedence over what is saved."""
    file = folder / "special_tokens_map.json"
    before = read_json(file)
    after = {
        name: text
        for name, text in tokenizer.special_tokens_map.items()
        if name in before and isinstance(text, str) and text != _content(before[name])
    }
    if after:
        update_json(file, **after)


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token


def write_reward_token(folder: Path, token: int) -> None:
    """Write the id of the token at which a reward model's reward is read."""
    (folder / REWARD_FILE).write_text(json.dumps({"reward_token_id": token}) + "\n", "utf-8")
    config = folder / "config.json"
    if "reward_token_id" in read_json(config):  # a class that looks for the token by itself
        update_json(config, reward_token_id=token)


def write_base_fingerprint(folder: Path, base_name: str) -> None:
    """Write the fingerprint of the base that an adapter was trained on.

    Args:
        folder: the adapter's.
        base_name: folder or hub name of the base; where it cannot be read, a message says so.
    """
    try:
        write_fingerprint(folder, base_name, Weights(find_model(base_name)))
    except UserError as error:
        print(tr("the base has no fingerprint in the adapter: {message}", message=error.message))
