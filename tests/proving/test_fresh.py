"""The fresh process loads an export with the class that was trained."""

from __future__ import annotations

import pytest

from tests.helpers.image_text import image_text_folder
from tests.helpers.tiny import save_tiny
from xtuner.proving.fresh import answer


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"), ("llama", "LlamaForCausalLM")],
)
def test_the_class_that_was_trained_is_loaded(kind, wanted, tmp_path):
    folder = save_tiny(tmp_path / "llama") if kind == "llama" else image_text_folder(kind)
    request = {
        "base": str(folder),
        "adapter": None,
        "merged": str(folder),
        "tokenizer": str(folder),
        "expected": None,
        "ids": [[5, 6, 7]],
        "stops": [],
        "new_tokens": 2,
        "question": "What is this?",
        "class": wanted,
        "own_classes": False,
        "trusted": False,
    }
    found = answer(request)
    assert "error" not in found, found
    assert found["differences"] == {"merged": 0.0} and found["tokens"] > 0
