"""Merging with the full model in memory: quantised bases, experts and reward models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from tests.helpers.tiny import make_tokenizer, save_tiny
from tests.tools.test_merge import (
    CONFIGS,
    adapter_on,
    base_plus_adapter,
    changing,
    classifier_on,
    logits,
    merged_logits,
)
from xtuner.entry_point import main
from xtuner.export import verify

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


def clip_on(root: Path) -> tuple[Path, Any]:
    """Save a CLIP vision model and an adapter on it; give its folder and both."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, image_size=28)
    config = CLIPVisionConfig(**sizes, num_attention_heads=2, patch_size=14)
    CLIPVisionModel(config).save_pretrained(root / "base")
    model = get_peft_model(CLIPVisionModel.from_pretrained(root / "base"), LORA)
    for weight in model.parameters():
        weight.data += 0.1 * weight.requires_grad
    model.save_pretrained(root / "adapter")
    return root / "base", model


def test_a_clip_encoder_and_nothing_else_is_merged_as_one(tiny_llama, tmp_path, capsys):
    _, model = clip_on(tmp_path)
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


EXPERTS = {
    "attention": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "experts": LoraConfig(
        r=4,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        task_type="CAUSAL_LM",
    ),
    "vera": VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "tokens": LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices=[3, 9], task_type="CAUSAL_LM"
    ),
}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    settings = {"num_local_experts": 2, "num_experts_per_tok": 2}
    return save_tiny(tmp_path_factory.mktemp("mixtral"), "mixtral", **settings)


def merge_large(base: Path, adapter: Path, out: Path, monkeypatch, *options: str) -> int:
    """Merge with a model that counts as large."""
    monkeypatch.setattr(verify, "AUTO_VERIFY_BYTES", 0)
    return main(["convert", "merge", str(base), str(adapter), str(out), *options])


@pytest.mark.parametrize("kind", EXPERTS)
def test_a_large_model_is_verified_when_it_is_read_again(
    kind, mixtral, tmp_path, capsys, monkeypatch
):
    adapter, out = adapter_on(mixtral, tmp_path / "adapter", EXPERTS[kind]), tmp_path / "out"
    assert merge_large(mixtral, adapter, out, monkeypatch) == 0
    said = capsys.readouterr().out
    assert "full model in memory" in said and "tensors were read again" in said
    expected = base_plus_adapter(mixtral, adapter)
    torch.testing.assert_close(merged_logits(out), expected, atol=2e-5, rtol=1e-4)


def test_each_layer_is_merged_in_fp32_and_rounded_once(mixtral, tmp_path, monkeypatch):
    adapter = adapter_on(mixtral, tmp_path / "adapter", EXPERTS["experts"])
    for name, options in {"exact": ["--no-verify"], "rounded": ["--dtype", "bf16"]}.items():
        assert merge_large(mixtral, adapter, tmp_path / name, monkeypatch, *options) == 0
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").state_dict()
        for name in ("exact", "rounded")
    )
    base = AutoModelForCausalLM.from_pretrained(mixtral).state_dict()
    assert any("experts" in name and not torch.equal(base[name], exact[name]) for name in base)
    for name, tensor in exact.items():
        if torch.equal(base[name], tensor):
            assert torch.equal(tensor.bfloat16(), rounded[name])
        else:  # the base is rounded when it is loaded, and the sum once more
            once = base[name].bfloat16().float() + tensor - base[name]
            torch.testing.assert_close(once, rounded[name].float(), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("change", ["norm.weight", "experts.1.w2", "lm_head.weight"])
def test_a_large_model_with_a_wrong_tensor_is_refused(
    change, mixtral, tmp_path, capsys, monkeypatch
):
    adapter, out = adapter_on(mixtral, tmp_path / "adapter", EXPERTS["attention"]), tmp_path / "out"
    changing(monkeypatch, change)
    assert merge_large(mixtral, adapter, out, monkeypatch) == 1
    said = capsys.readouterr().err
    assert "are not those of the expected model" in said and not out.exists()
    assert ("experts.down_proj" if "w2" in change else change) in said


@pytest.mark.parametrize("checked", [True, False])
def test_a_layer_that_is_merged_wrong_is_refused(checked, mixtral, tmp_path, capsys, monkeypatch):
    adapter = adapter_on(mixtral, tmp_path / "adapter", EXPERTS["attention"])
    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda *words: 1.1 * right(*words))
    options = [] if checked else ["--no-verify"]
    assert merge_large(mixtral, adapter, tmp_path / "out", monkeypatch, *options) == checked
    if checked:
        said = capsys.readouterr().err
        assert "layers.0.self_attn.q_proj" in said and "not those of the expected" in said


@pytest.mark.parametrize("kind", ["4 bits", "clip"])
def test_other_large_models_are_read_again(
    kind, tiny_llama, four_bits, tmp_path, capsys, monkeypatch
):
    if kind == "clip":
        base, adapter, options = clip_on(tmp_path)[0], tmp_path / "adapter", ["--is-clip"]
    else:
        base, options = four_bits, []
        adapter = adapter_on(tiny_llama, tmp_path / "adapter", CONFIGS["lora"])
    assert merge_large(base, adapter, tmp_path / "out", monkeypatch, *options) == 0
    assert "tensors were read again" in capsys.readouterr().out
    monkeypatch.setattr(Linear, "get_delta_weight", lambda layer, name: layer.weight * 0)
    assert merge_large(base, adapter, tmp_path / "wrong", monkeypatch, *options) == 1
    assert not (tmp_path / "wrong").exists()
