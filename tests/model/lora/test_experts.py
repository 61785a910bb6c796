"""Mixtures of experts: 4-bit experts equal their dequantised twins, and adapters reach experts."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.helpers.tiny import save_tiny
from xtuner.model import SupervisedFinetune
from xtuner.reporting.summary import count_parameters

MOE = dict(num_local_experts=2, num_experts_per_tok=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("models") / "moe", "mixtral", **MOE))


def build(folder, targets, quantized=True, dropout=0.0):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return SupervisedFinetune(
        llm=dict(
            type=AutoModelForCausalLM.from_pretrained,
            pretrained_model_name_or_path=folder,
            dtype=torch.float32,
            **({"quantization_config": quantization} if quantized else {}),
        ),
        lora=LoraConfig(r=4, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM"),
    )


def batch():
    ids = torch.arange(3, 35)[None]
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def expert_tensors(model):
    return [
        (module, name)
        for module in model.modules()
        for name in ("gate_up_proj", "down_proj")
        if isinstance(getattr(module, name, None), torch.Tensor)
        and type(module).__name__.endswith("MixtralExperts")
    ]


def test_frozen_experts_are_kept_in_4_bits(folder):
    torch.manual_seed(0)
    model = build(folder, ["q_proj", "v_proj"])
    tensors = expert_tensors(model)
    assert len(tensors) == 4
    for module, name in tensors:
        assert module.parametrizations[name].original.dtype == torch.uint8
    model.forward(batch())["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_4_bit_experts_equal_their_dequantised_twin(folder):
    torch.manual_seed(0)
    ours = build(folder, ["q_proj", "v_proj"])
    twin = build(folder, ["q_proj", "v_proj"], quantized=False)
    weights = {
        name.replace(".parametrizations.", ".").removesuffix(".original"): weight
        for name, weight in ours.llm.named_parameters()
        if weight.is_floating_point()
    }
    for name, module in ours.llm.named_modules():
        weight = module._parameters.get("weight")
        if hasattr(weight, "quant_state"):
            weights[f"{name}.weight"] = dequantize_4bit(weight, weight.quant_state)
    for (module, name), (other, _) in zip(expert_tensors(ours), expert_tensors(twin), strict=True):
        other.get_parameter(name).data.copy_(getattr(module, name))
    twin.llm.load_state_dict(weights, strict=False)
    loss, expected = ours.forward(batch())["loss"], twin.forward(batch())["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_all_parameters_are_counted(folder):
    whole = count_parameters(build(folder, ["q_proj"], quantized=False))
    assert count_parameters(build(folder, ["q_proj"])) == whole


def test_adapters_on_experts_train_and_the_cost_is_said(folder, caplog):
    model = build(folder, ["q_proj", "w1", "w2", "w3"], dropout=0.1)
    assert "lora_dropout=0.1 is set to 0" in caplog.text
    assert "The experts stay in 16 bits" in caplog.text
    model.forward(batch())["loss"].backward()
    on_experts = [
        weight
        for name, weight in model.named_parameters()
        if "experts" in name and "lora_B" in name
    ]
    assert len(on_experts) == 4
    assert any(weight.grad.abs().sum() > 0 for weight in on_experts)
