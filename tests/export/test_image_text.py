"""What is written of a vision-language model is the trained one in stock transformers and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from tests.helpers.image_text import image_text_folder, processed, samples_of
from tests.helpers.tiers import few_fast
from xtuner.config import load_config
from xtuner.entry_point import main
from xtuner.registry import BUILDER
from xtuner.tokenization.processor import load_processor

CONFIG = """
from peft import LoraConfig
from transformers import AutoModelForImageTextToText
from xtuner.model import VisionLanguageFinetune
from xtuner.tokenization.processor import load_processor

path = {base!r}
processor = dict(type=load_processor, name_or_path=path)
model = dict(
    type=VisionLanguageFinetune,
    llm=dict(type=AutoModelForImageTextToText.from_pretrained, pretrained_model_name_or_path=path),
    processor=processor,
    {settings}
)
"""
FULL = "freeze_visual_encoder=False, freeze_projector=False,"
LORA = """lora=dict(type=LoraConfig, r=4, task_type="CAUSAL_LM"),
    visual_encoder_lora=dict(type=LoraConfig, r=2), freeze_projector=False,"""
KINDS = ("qwen3_vl", "qwen3_5", "gemma3", "smolvlm")


def trained(folder: Path, base: Path, settings: str) -> Any:
    """Write ``config.py`` and ``iter_1.pth`` and return the model as trained."""
    (folder / "config.py").write_text(CONFIG.format(base=str(base), settings=settings), "utf-8")
    model = BUILDER.build(load_config(str(folder / "config.py")).model)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    torch.save({"meta": {}, "state_dict": model.state_dict()}, folder / "iter_1.pth")
    return model


def logits(model: Any, processor: Any) -> torch.Tensor:
    batch = processed(processor, samples_of(processor)[::2])
    with torch.no_grad():
        logits = model.eval().float()(**batch).logits
    return logits * batch["attention_mask"][..., None]


@pytest.mark.parametrize("kind", few_fast(KINDS, ["qwen3_vl", "gemma3"]))
def test_a_full_model(kind, tmp_path):
    base, out = image_text_folder(kind), tmp_path / "hf"
    model = trained(tmp_path, base, FULL)
    assert main(["convert", "pth_to_hf", str(tmp_path / "iter_1.pth"), str(out)]) == 0
    stock, processor = AutoModelForImageTextToText.from_pretrained(out), load_processor(out)
    found, wanted = logits(stock, processor), logits(model.llm, load_processor(base))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    kept = {file.name for file in base.iterdir()}
    assert kept <= {file.name for file in out.iterdir()}


@pytest.mark.parametrize("kind", few_fast(KINDS, ["qwen3_vl", "gemma3"]))
def test_an_adapter_and_its_merge(kind, tmp_path):
    base, out, merged = image_text_folder(kind), tmp_path / "hf", tmp_path / "merged"
    model = trained(tmp_path, base, LORA)
    wanted = logits(model.llm, load_processor(base))
    assert main(["convert", "pth_to_hf", str(tmp_path / "iter_1.pth"), str(out)]) == 0
    stock = AutoModelForImageTextToText.from_pretrained(base)
    found = logits(PeftModel.from_pretrained(stock, out), load_processor(out))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert main(["convert", "merge", str(base), str(out), str(merged)]) == 0
    whole = AutoModelForImageTextToText.from_pretrained(merged)
    found = logits(whole, load_processor(merged))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_to_hf_writes_the_processor(tmp_path):
    base = image_text_folder("qwen2_5_vl")
    model = trained(tmp_path, base, FULL)
    model.to_hf(tmp_path / "hf")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    found = logits(stock, load_processor(tmp_path / "hf"))
    torch.testing.assert_close(found, logits(model.llm, load_processor(base)), rtol=0, atol=1e-5)
