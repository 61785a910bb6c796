"""Merging with the full model in memory: quantised bases and reward models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.tiny import make_tokenizer, save_tiny
from tests.tools.test_merge import CONFIGS, adapter_on, classifier_on, logits, merged_logits
from xtuner.entry_point import main


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory) -> Path:
    """A base saved in 4 bits."""
    from transformers import BitsAndBytesConfig

    root = tmp_path_factory.mktemp("four_bits")
    plain = save_tiny(root / "plain")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings)
    model.save_pretrained(root / "base")
    make_tokenizer().save_pretrained(root / "base")
    return root / "base"


def test_a_quantised_base_is_dequantised_and_said(tiny_llama, four_bits, tmp_path, capsys):
    adapter = adapter_on(tiny_llama, tmp_path / "adapter", CONFIGS["lora"])
    out = tmp_path / "out"
    assert main(["convert", "merge", str(four_bits), str(adapter), str(out)]) == 0
    said = capsys.readouterr().out
    assert "dequantised" in said and "verified" in said
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert merged_logits(out).isfinite().all()


@pytest.mark.parametrize("kind", ["4 bits", "mixtral"])
def test_a_reward_model_is_merged_in_memory(kind, four_bits, tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification

    loader = AutoModelForSequenceClassification
    base = four_bits
    if kind == "mixtral":
        base = save_tiny(tmp_path / "base", "mixtral", num_local_experts=2)
    adapter = tmp_path / "adapter"
    model = classifier_on(base, adapter, 1)
    out = tmp_path / "out"
    words = ["convert", "merge", str(base), str(adapter), str(out), "--dtype", "fp32"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "full model in memory" in said and "verified: each weight" in said
    assert "Score answers with it" in said and "MISSING" not in said
    found = loader.from_pretrained(out)
    assert found.config.num_labels == 1
    torch.testing.assert_close(logits(found), logits(model).float(), atol=1e-3, rtol=1e-2)
