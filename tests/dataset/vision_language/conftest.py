"""Photos, rows about them, and the processors of ten families."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.image_text import FAMILIES, make_image, save_processor
from xtuner.tokenization.processor import load_processor

SIZES = [(40, 40), (64, 48), (31, 57), (90, 33), (101, 99), (28, 28)]
"""Of the photos 0.png, 1.png, ..."""


def talk(*turns: str) -> list[dict[str, str]]:
    """Messages of a user and an assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]


ROWS: list[dict[str, Any]] = [
    {"images": ["0.png"], "messages": talk("<image>What?", "Zap")},
    {
        "images": ["1.png", "2.png"],
        "messages": talk("a <image> b <image> c", "Zwo", "more?", "Zo"),
    },
    {"images": [], "messages": talk("hi", "Zip")},
    {"images": ["3.png"], "messages": talk("look", "Zed")},
    {
        "images": ["4.png", "5.png", "0.png"],
        "messages": talk("<image>", "Zen", "<image><image>", "Zoo"),
    },
]


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the photos and ``rows.jsonl``."""
    folder = tmp_path_factory.mktemp("photos")
    for number, size in enumerate(SIZES):
        make_image(*size, number).save(folder / f"{number}.png")
    write_rows(folder, ROWS)
    return folder


def write_rows(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    """Write rows as JSON lines."""
    file = folder / name
    file.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    return file


@pytest.fixture(scope="session")
def processor_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: family → the folder of its processor."""
    root = tmp_path_factory.mktemp("processors")

    @functools.cache
    def folder(kind: str) -> Path:
        (root / kind).mkdir()
        save_processor(root / kind, kind)
        return root / kind

    return folder


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, processor_folder: Any) -> dict[str, Any]:
    """The config of the processor of each family."""
    return {"type": load_processor, "name_or_path": str(processor_folder(request.param))}


@pytest.fixture
def qwen(processor_folder: Any) -> dict[str, Any]:
    """The config of Qwen2.5-VL's processor."""
    return {"type": load_processor, "name_or_path": str(processor_folder("qwen2_5_vl"))}
