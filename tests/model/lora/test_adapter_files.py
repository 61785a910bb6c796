"""An adapter is read whole, also where peft alone leaves layers out."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.helpers.architectures import make_architecture
from xtuner.entry_point import main
from xtuner.model.lora.adapter_files import layers_lost_by_peft, load_adapter
from xtuner.tools.model_converters import pth_to_hf
from xtuner.utils.errors import UserError

LOST = [f"model.layers.1.self_attn.{name}_sconv.weight_proj" for name in "kv"]
"""What peft renames as transformers renames weights of Inkling 2."""
FILE = "adapter_model.safetensors"


def make():
    return make_architecture("inkling2_text", attention="eager").eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base, an adapter on it, and the logits of both together."""
    root = tmp_path_factory.mktemp("inkling")
    base = make()
    base.save_pretrained(root / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj", "weight_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    model.save_pretrained(root / "adapter")
    return root, logits(model), model


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(100, 109)[None], use_cache=False).logits


def test_layers_that_peft_leaves_out_are_read(saved):
    root, wanted, _ = saved
    with pytest.warns(UserWarning, match="missing adapter keys"):  # or this test holds nothing
        stock = PeftModel.from_pretrained(make(), root / "adapter").eval()
    assert not torch.allclose(logits(stock), wanted, atol=1e-4)
    torch.testing.assert_close(logits(load_adapter(make(), root / "adapter").eval()), wanted)


def test_they_are_merged(saved):
    root, wanted, _ = saved
    words = ["convert", "merge", *(str(root / name) for name in ("base", "adapter", "merged"))]
    assert main(words) == 0
    merged = type(make()).from_pretrained(root / "merged", attn_implementation="eager").eval()
    torch.testing.assert_close(logits(merged), wanted, atol=1e-5, rtol=1e-4)


def test_they_are_named_when_an_adapter_is_written(saved, capsys):
    model = saved[2]
    assert layers_lost_by_peft(model) == LOST
    pth_to_hf._warn_of_lost_layers(model)
    assert LOST[0] in capsys.readouterr().err
    pth_to_hf._warn_of_lost_layers(make())
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    for kind in ("llama", "mixtral"):  # the second has rules that rename nothing here
        other = get_peft_model(make_architecture(kind, attention="eager"), lora)
        assert not layers_lost_by_peft(other)
        pth_to_hf._warn_of_lost_layers(other)
    assert not capsys.readouterr().err


def test_a_tensor_that_the_file_lacks_is_named(saved, tmp_path):
    root, _, _ = saved
    for file in (root / "adapter").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / FILE)
    del tensors[f"base_model.model.{LOST[1]}.lora_B.weight"]
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks tensors: .*v_sconv\.weight_proj\.lora_B"):
        load_adapter(make(), tmp_path)


def test_a_file_is_read_once(tmp_path, monkeypatch):
    from peft import peft_model

    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    model = get_peft_model(make_architecture("llama", attention="eager"), lora)
    model.save_pretrained(tmp_path)
    read, load = [], peft_model.load_peft_weights
    monkeypatch.setattr(
        peft_model,
        "load_peft_weights",
        lambda *args, **how: read.append(args) or load(*args, **how),
    )
    load_adapter(make_architecture("llama", attention="eager"), tmp_path)
    assert len(read) == 1
