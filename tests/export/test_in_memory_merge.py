"""Merging with the full model in memory: quantised bases and reward models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from tests.helpers.tiny import make_tokenizer, save_tiny
from tests.tools.test_merge import CONFIGS, adapter_on, classifier_on, logits, merged_logits
from xtuner.entry_point import main

LORA = LoraConfig(r=2, target_modules=["q_proj"])


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


def test_a_clip_encoder_and_nothing_else_is_merged_as_one(tiny_llama, tmp_path, capsys):
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, image_size=28)
    config = CLIPVisionConfig(**sizes, num_attention_heads=2, patch_size=14)
    CLIPVisionModel(config).save_pretrained(tmp_path / "base")
    model = get_peft_model(CLIPVisionModel.from_pretrained(tmp_path / "base"), LORA)
    for weight in model.parameters():
        weight.data += 0.1 * weight.requires_grad
    model.save_pretrained(tmp_path / "adapter")
    words = [str(tmp_path / "adapter"), str(tmp_path / "out"), "--is-clip"]
    assert main(["convert", "merge", str(tiny_llama), *words]) == 1
    assert "this is a llama model, not CLIP" in capsys.readouterr().err
    assert main(["convert", "merge", str(tmp_path / "base"), *words]) == 0
    pixels = torch.randn(1, 3, 28, 28)
    merged = CLIPVisionModel.from_pretrained(tmp_path / "out").eval()
    found, wanted = merged(pixels).pooler_output, model.eval()(pixels).pooler_output
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


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
