"""Adapters of every kind of LoraConfig: saved whole, converted and merged rightly."""

from __future__ import annotations

import json
import textwrap

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForConditionalGeneration

from tests.helpers.tiers import few_fast
from tests.helpers.tiny import make_tokenizer, save_tiny
from xtuner.config import load_config
from xtuner.entry_point import main
from xtuner.registry import BUILDER

CONFIG = """
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from xtuner.model import SupervisedFinetune
from xtuner.utils import PROMPT_TEMPLATE

path = {path!r}
prompt_template = PROMPT_TEMPLATE.internlm2_chat
tokenizer = dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=path)
model = dict(
    type=SupervisedFinetune,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=path,
        dtype=torch.float32,
        {quantization}
    ),
    lora=dict(type=LoraConfig, r=4, lora_alpha=8, task_type="CAUSAL_LM", {lora}),
)
"""
FOUR_BITS = """quantization_config=dict(
    type=BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.float32,
),"""
KINDS = {
    "lora": "",
    "dora": "use_dora=True",
    "rslora": "use_rslora=True",
    "pissa": 'init_lora_weights="pissa"',
    "modules_to_save": 'target_modules=["q_proj"], modules_to_save=["lm_head"]',
    "pattern": 'target_modules=r".*layers\\.1\\..*_proj", rank_pattern={"q_proj": 2}',
    "bias": 'bias="lora_only"',
    "qlora": "",
}


@pytest.mark.parametrize("kind", few_fast(KINDS, [*KINDS][::3]))
def test_trained_converted_and_merged_compute_the_same(kind, tmp_path, capsys):
    base = save_tiny(tmp_path / "base")
    config = tmp_path / "my.py"
    quantization = FOUR_BITS if kind == "qlora" else ""
    text = textwrap.dedent(CONFIG)
    text = text.format(path=str(base), lora=KINDS[kind], quantization=quantization)
    config.write_text(text, "utf-8")
    torch.manual_seed(0)
    model = BUILDER.build(load_config(str(config)).model)
    ids = torch.arange(5, 25)[None]
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch)["loss"].backward()
        optimizer.step()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    state = model.state_dict()
    assert set(state) == trained
    torch.save({"state_dict": state, "meta": {"iter": 3}}, tmp_path / "iter_3.pth")
    words = ["convert", "pth_to_hf", str(config), str(tmp_path / "iter_3.pth")]
    assert main([*words, str(tmp_path / "hf")]) == 0
    assert "verified" in capsys.readouterr().out
    assert main(["convert", "merge", str(base), str(tmp_path / "hf"), str(tmp_path / "out")]) == 0
    assert "verified" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stock = PeftModel.from_pretrained(plain, str(tmp_path / "hf")).eval()
    with torch.no_grad():
        found, expected = (m(input_ids=ids).logits for m in (merged, stock))
        ours = model.eval()(batch, mode="tensor").logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    if kind != "qlora":  # its base is rounded to 4 bits, the merged one is not
        torch.testing.assert_close(expected, ours, rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "hf" / "adapter_config.json").read_text())["r"] == 4


def test_a_multimodal_class_trained_on_text(tmp_path, capsys):
    base = tmp_path / "base"
    make_tokenizer().save_pretrained(base)
    text = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(base)
    file = tmp_path / "my.py"
    lora = 'target_modules=["q_proj"]'  # a name that the vision tower has, too
    file.write_text(CONFIG.format(path=str(base), lora=lora, quantization=""), "utf-8")
    model = BUILDER.build(load_config(str(file)).model)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    state = model.state_dict()
    assert state and not any("vision" in name for name in state)
    torch.save({"state_dict": state, "meta": {"iter": 3}}, tmp_path / "iter_3.pth")
    words = ["convert", "pth_to_hf", str(file), str(tmp_path / "iter_3.pth")]
    assert main([*words, str(tmp_path / "hf")]) == 0
    assert main(["convert", "merge", str(base), str(tmp_path / "hf"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.count("verified: largest difference of logits") == 2, said
    merged = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = model.eval()({"input_ids": ids}, mode="tensor").logits
        found = merged.eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
