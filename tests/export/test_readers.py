"""``--for vllm|sglang|lmdeploy``: names of the class that the base names, or the reason why not."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from tests.helpers.tiny import make_tokenizer, save_tiny
from tests.tools.test_pth_to_hf import LORA, trained
from xtuner.entry_point import main
from xtuner.export import readers, serving
from xtuner.utils.errors import UserError

TEXT = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "layer_types": ["full_attention"] * 2,
    "max_position_embeddings": 128,
}
VISION = {
    "depth": 1,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "num_attention_heads": 2,
    "out_hidden_size": 32,
    "image_size": 16,
    "patch_size": 8,
    "num_position_embeddings": 16,
}
PROBE = torch.arange(40).reshape(2, 20) * 7 % 500


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROBE).logits


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """A folder of Qwen3.5, whose text class AutoModelForCausalLM loads."""
    folder = tmp_path_factory.mktemp("qwen") / "base"
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=TEXT, vision_config=VISION)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    """A folder of Gemma 3, whose vision tower has layers called as those of the text model."""
    folder = tmp_path_factory.mktemp("gemma") / "base"
    torch.manual_seed(0)
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def adapter_of(model: Any, folder: Path, **settings: Any) -> Path:
    """An adapter on a model, every number off its start."""
    chosen: Any = dict(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, LoraConfig(**(chosen | settings)))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def names(adapter: Path) -> set[str]:
    return set(load_file(adapter / "adapter_model.safetensors"))


def test_an_adapter_of_the_text_class_is_written_for_the_folders_class(
    qwen, tmp_path, capsys, monkeypatch
):
    """As trained, stock peft on the folder's own class leaves it without effect; written, not."""
    work, out, plain = tmp_path / "work", tmp_path / "out", tmp_path / "plain"
    model = trained(work, qwen, LORA.format(save=[]))
    words = ["convert", "pth_to_hf", str(work / "iter_1.pth")]
    assert main([*words, str(plain)]) == 0
    assert main([*words, str(out), "--for", "vllm"]) == 0
    said = capsys.readouterr().out
    assert f"vllm serve {qwen} --enable-lora --lora-modules out={out} --max-lora-rank 8" in said
    assert all(name.startswith("base_model.model.model.layers.") for name in names(plain))
    prefix = "base_model.model.model.language_model.layers."
    assert names(out) == {
        name.replace("base_model.model.model.layers.", prefix) for name in names(plain)
    }
    whole = Qwen3_5ForConditionalGeneration.from_pretrained(qwen, dtype=torch.float32)
    for name in names(out):
        whole.get_submodule(name.removeprefix("base_model.model.").partition(".lora_")[0])
    before = logits(whole)
    with warnings.catch_warnings(action="ignore"):  # of the tensors that peft does not find
        unchanged = logits(PeftModel.from_pretrained(copy.deepcopy(whole), plain))
    assert torch.equal(unchanged, before)
    after = logits(PeftModel.from_pretrained(whole, out))
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, logits(model.llm), atol=2e-5, rtol=1e-4)


def test_a_tower_with_layers_of_the_same_names_gets_no_adapter(gemma, tmp_path):
    config = Gemma3Config.from_pretrained(gemma).text_config
    adapter = adapter_of(Gemma3ForCausalLM(config), tmp_path / "adapter", target_modules=["q_proj"])
    assert readers.fit_adapter(adapter, gemma, "sglang")
    whole = Gemma3ForConditionalGeneration.from_pretrained(gemma, dtype=torch.float32)
    before = logits(whole)
    wrapped = PeftModel.from_pretrained(whole, adapter)
    assert {name for name, _ in wrapped.named_parameters() if "lora_" in name} == {
        name.replace(".weight", ".default.weight") for name in names(adapter)
    }
    assert all(".language_model.layers." in name for name in names(adapter))
    assert (logits(wrapped) - before).abs().max() > 1e-3


def test_names_that_fit_are_left(gemma, tmp_path):
    base = save_tiny(tmp_path / "base")
    for folder, chosen in ((base, ["q_proj"]), (gemma, r".*language_model.*\.q_proj")):
        adapter = tmp_path / f"adapter_{folder.parent.name}"
        adapter_of(AutoModelForCausalLM.from_pretrained(folder), adapter, target_modules=chosen)
        before = (adapter / "adapter_config.json").read_text(), names(adapter)
        assert not readers.fit_adapter(adapter, folder, "vllm")
        assert before == ((adapter / "adapter_config.json").read_text(), names(adapter))


REFUSED: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "use_dora": {"use_dora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 32}},
    "bias": {"bias": "lora_only"},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_server_would_leave_out_is_refused(kind, tiny_llama, tmp_path):
    llm = AutoModelForCausalLM.from_pretrained(tiny_llama)
    adapter = adapter_of(llm, tmp_path / "adapter", **REFUSED[kind])
    with pytest.raises(UserError, match=f"beyond plain LoRA: .*{kind}"):
        readers.fit_adapter(adapter, tiny_llama, "lmdeploy")
    assert not readers.fit_adapter(adapter, tiny_llama, readers.TRANSFORMERS)


def test_experts_and_other_bases_are_refused(tiny_llama, tmp_path):
    base = save_tiny(tmp_path / "base", "mixtral", num_local_experts=2)
    llm = AutoModelForCausalLM.from_pretrained(base)
    experts = {"target_parameters": ["experts.down_proj"], "target_modules": ["q_proj"]}
    adapter = adapter_of(llm, tmp_path / "adapter", **experts)
    with pytest.raises(UserError, match="target_parameters, experts"):
        readers.fit_adapter(adapter, base, "vllm")
    deep = save_tiny(tmp_path / "deep", num_hidden_layers=3)
    adapter = adapter_of(AutoModelForCausalLM.from_pretrained(deep), tmp_path / "more")
    with pytest.raises(UserError, match=r"LlamaForCausalLM has no modules.*layers\.2"):
        readers.fit_adapter(adapter, tiny_llama, "vllm")
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    settings = json.loads((other / "config.json").read_text())
    settings["architectures"] = ["NobodyForCausalLM"]
    (other / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="NobodyForCausalLM is not known here"):
        readers.fit_adapter(adapter, other, "vllm")


def test_a_merged_model_keeps_the_bases_class_and_names(qwen, tmp_path):
    llm = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32)
    adapter = adapter_of(llm, tmp_path / "adapter")
    out = tmp_path / "merged"
    words = ["convert", "merge", str(qwen), str(adapter), str(out), "--for", "vllm"]
    assert main(words) == 0
    readers.check_model(out, qwen, "vllm")
    text = tmp_path / "text"
    llm.save_pretrained(text)
    with pytest.raises(UserError, match="but its base is Qwen3_5ForConditionalGeneration"):
        readers.check_model(text, qwen, "vllm")
    shutil.copyfile(qwen / "config.json", text / "config.json")
    with pytest.raises(UserError, match="named otherwise"):
        readers.check_model(text, qwen, "vllm")
    readers.check_model(text, qwen, readers.TRANSFORMERS)


def test_full_training_of_the_text_class_is_refused_for_a_server(qwen, tmp_path, capsys):
    work = tmp_path / "work"
    trained(work, qwen)
    words = ["convert", "pth_to_hf", str(work / "iter_1.pth"), str(tmp_path / "out")]
    assert main([*words, "--for", "sglang", "--no-verify"]) != 0
    assert "but its base is Qwen3_5ForConditionalGeneration" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_commands_name_base_and_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 40}')
    for reader, name in readers.SERVERS.items():
        command = serving.adapter_command(reader, "my/base", tmp_path)
        assert name.lower() in command and "my/base" in command and f"={tmp_path}" in command
    assert serving.adapter_command("vllm", "b", tmp_path).endswith("--max-lora-rank 64")
