"""Model folders without weights and rows of one's own, for configs of the catalogue."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.architectures import make_config
from tests.helpers.tiny import make_tokenizer
from xtuner.config.document import ConfigDocument
from xtuner.config.load import load
from xtuner.config.override import override

LORA = "qwen2_5_7b_instruct_lora_custom_sft_e1"
FULL = "qwen2_5_7b_instruct_full_custom_sft_e1"
QLORA = "qwen2_5_7b_instruct_qlora_custom_sft_e1"


def save_base(folder: Path, kind: str = "llama", **changes: object) -> Path:
    """Write ``config.json`` and a tokenizer."""
    config = make_config(kind, **changes)
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_rows(file: Path, count: int = 8) -> Path:
    """Write conversations of different lengths."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n}? {'very ' * (n % 5)}"},
                {"role": "assistant", "content": f"It is {str(n) * (1 + n % 3)}."},
            ]
        }
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def options(base: Path, rows: Path, *more: str) -> list[str]:
    """Words of ``--cfg-options`` that put a config of the catalogue on a folder and rows."""
    return [
        f"pretrained_model_name_or_path={str(base)!r}",
        f"data_files={str(rows)!r}",
        "max_length=64",
        "evaluation_inputs=['one']",
        *more,
    ]


def document(name: str, words: list[str]) -> ConfigDocument:
    """A loaded config, overrides applied."""
    return override(load(name), words)
