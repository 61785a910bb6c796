"""Merging a reward model's adapter: the result is a sequence classifier with one label."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from xtuner.tools.chat_reward import REWARD_FILE
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr


def merge_reward(
    base: Path, adapter: Path, aside: Path, *, dtype: Any, device: str, max_shard_size: str
) -> None:
    """Write base and adapter as one ``AutoModelForSequenceClassification``, in memory.

    Args:
        base: the folder of the language model.
        adapter: the adapter's; it holds the head too.
        aside: the folder to write into.
        dtype: number format; the base's own when None.
        device: where to merge.
        max_shard_size: of a file, as transformers takes it.
    """
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from xtuner.tools.model_converters.probe import quiet

    loader: Any = AutoModelForSequenceClassification
    try:
        with quiet():
            model = loader.from_pretrained(
                base, num_labels=1, dtype=dtype or "auto", device_map=device
            )
            merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            tr(f"the adapter does not fit the base: {error}", f"适配器与基座不匹配: {error}"),
            where=Where(str(adapter)),
        ) from error
    merged.save_pretrained(aside, max_shard_size=max_shard_size)
    if (adapter / REWARD_FILE).is_file():
        shutil.copy(adapter / REWARD_FILE, aside / REWARD_FILE)
