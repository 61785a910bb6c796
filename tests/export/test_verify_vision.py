"""LLaVA and InternVL are read again after writing: what was written wrong is refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiers import slow
from tests.helpers.tiny import make_model, make_tokenizer, save_tiny
from tests.helpers.tiny_internvl import save_internvl
from tests.helpers.vision_language import save_clip
from xtuner.config import load_config
from xtuner.entry_point import main
from xtuner.export import verify, verify_vision
from xtuner.registry import BUILDER

CONFIG = """
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor, CLIPVisionModel
from xtuner.model import InternVL_V1_5, LLaVAModel
from xtuner.utils import PROMPT_TEMPLATE

llm, clip, internvl = {paths!r}
prompt_template = PROMPT_TEMPLATE.vicuna
tokenizer = dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=llm)
image_processor = dict(
    type=CLIPImageProcessor.from_pretrained, pretrained_model_name_or_path=clip)
lora = dict(type=LoraConfig, r=4, lora_alpha=8, task_type="CAUSAL_LM")
visual_lora = dict(type=LoraConfig, r=4, lora_alpha=8)
parts = dict(
    type=LLaVAModel,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=llm),
    visual_encoder=dict(type=CLIPVisionModel.from_pretrained, pretrained_model_name_or_path=clip))
whole = dict(type=InternVL_V1_5, model_path=internvl)
model = dict({settings})
"""
ADAPTERS = (
    "**parts, freeze_llm=True, freeze_visual_encoder=True, llm_lora=lora, "
    "visual_encoder_lora=visual_lora"
)
SAVED = f"{ADAPTERS}, ".replace("=lora", "=dict(**lora, modules_to_save=['lm_head'])")
KINDS = {
    "projector": ("**parts, freeze_llm=True, freeze_visual_encoder=True", "xtuner"),
    "adapters": (ADAPTERS, "xtuner"),
    "full": ("**parts", "xtuner"),
    "huggingface": (SAVED, "huggingface"),
    "official": (ADAPTERS, "official"),
    "dora": (ADAPTERS.replace("=lora", "=dict(**lora, use_dora=True)"), "huggingface"),
    "official_full": ("**parts", "official"),
    "internvl": ("**whole, freeze_llm=True, llm_lora=lora", "xtuner"),
    "internvl_both": (
        "**whole, freeze_llm=True, freeze_visual_encoder=True, llm_lora=lora, "
        "visual_encoder_lora=visual_lora",
        "xtuner",
    ),
    "internvl_full": ("**whole", "xtuner"),
}
FP32 = {"huggingface", "dora", "internvl"}
"""Merged in fp32 and written so: sums with bases in bf16 are not rounded."""
SELDOM = {"projector", "dora", "official_full", "internvl_both", "internvl_full"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("我的 bases")
    save_tiny(root / "llm", tie_word_embeddings=True)
    make_model().bfloat16().save_pretrained(root / "untied")
    make_tokenizer().save_pretrained(root / "untied")
    save_clip(root / "clip")
    save_internvl(root / "internvl")
    return root


def trained(folder: Path, bases: Path, settings: str, llm: str = "untied") -> Path:
    """A checkpoint whose trained numbers are all off their start."""
    folder.mkdir()
    paths = [str(bases / name) for name in (llm, "clip", "internvl")]
    text = CONFIG.replace("{paths!r}", repr(paths)).replace("{settings}", settings)
    (folder / "config.py").write_text(text, "utf-8")
    model = BUILDER.build(load_config(str(folder / "config.py")).model)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    torch.save({"meta": {}, "state_dict": model.state_dict()}, folder / "iter_1.pth")
    return folder / "iter_1.pth"


def damage(folder: Path, name: str = "") -> None:
    """Change one number of the last tensor of a file of weights in a folder."""
    file = sorted(folder.rglob(f"{name}*.safetensors"))[0]
    tensors = load_file(file)
    tensors[max(tensors)].view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", [slow(kind) if kind in SELDOM else kind for kind in KINDS])
def test_each_weight_and_the_logits(kind, bases, tmp_path, capsys, monkeypatch):
    settings, layout = KINDS[kind]
    checkpoint = trained(tmp_path / "run", bases, settings)
    words = ["convert", "pth_to_hf", str(checkpoint)]
    flags = ["--save-format", layout] if layout != "xtuner" else []
    flags += ["--fp32"] if kind in FP32 else []
    assert main([*words, str(tmp_path / "out"), *flags]) == 0
    said = capsys.readouterr().out
    assert "tensors were read again" in said
    assert "largest difference of logits" in said

    checks = ("check_parts", "check_merged_llava", "check_internvl")
    for check in checks:
        real = getattr(verify_vision, check)
        monkeypatch.setattr(verify_vision, check, functools.partial(after_damage, real))
    monkeypatch.setattr(verify, "AUTO_VERIFY_BYTES", 0)  # the files alone
    assert main([*words, str(tmp_path / "wrong"), *flags]) == 1
    assert "are not those of the expected model" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


def after_damage(check: Any, *words: Any) -> None:
    damage(next(word for word in words if isinstance(word, Path)))
    check(*words)


@pytest.mark.parametrize("kind", ["adapters", slow("internvl"), slow("official")])
def test_what_weights_do_not_show_the_logits_do(kind, bases, tmp_path, capsys, monkeypatch):
    settings, layout = KINDS[kind]
    checkpoint = trained(tmp_path / "run", bases, settings)
    for check in ("check_parts", "check_merged_llava", "check_internvl"):
        monkeypatch.setattr(verify_vision, check, spoil)
    words = ["--save-format", layout] if layout != "xtuner" else []
    assert main(["convert", "pth_to_hf", str(checkpoint), str(tmp_path / "out"), *words]) == 1
    assert "its logits are" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def spoil(*words: Any) -> None:
    folder = next(word for word in words if isinstance(word, Path))
    for file in folder.rglob("*.safetensors"):
        tensors = {name: tensor * 3 for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


def test_what_training_leaves_alone_is_written_too(bases, tmp_path):
    """The encoder's layers behind the selected one, and one of two tied weights."""
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    checkpoint = trained(tmp_path / "run", bases, "**parts", llm="llm")
    out = tmp_path / "out"
    assert main(["convert", "pth_to_hf", str(checkpoint), str(out)]) == 0
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    llm = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert llm.config.tie_word_embeddings
    assert torch.equal(llm.lm_head.weight, state["llm.model.embed_tokens.weight"])
    base = CLIPVisionModel.from_pretrained(bases / "clip").state_dict()
    encoder = CLIPVisionModel.from_pretrained(out / "visual_encoder", dtype="auto").state_dict()
    for name, tensor in encoder.items():
        assert torch.equal(tensor, state.get(f"visual_encoder.{name}", base[name])), name
    assert any(f"visual_encoder.{name}" not in state for name in encoder)
