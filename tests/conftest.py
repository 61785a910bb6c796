"""Fixtures that many tests share: a tiny model folder, one per test session."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["XTUNER_LANG"] = "en"


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama and a byte-level tokenizer."""
    from tests.helpers.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("models") / "tiny_llama")


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer with 512 entries."""
    from tests.helpers.tiny import make_tokenizer

    return make_tokenizer()
