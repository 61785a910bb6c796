"""LoRA and QLoRA on our classes: the published adapters fit, loss and gradients are peft's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BitsAndBytesConfig

from tests.helpers.golden_model import tokens
from tests.model.transformers_models.test_golden import CASES, build
from xtuner.model import SupervisedFinetune
from xtuner.model.modules import attention
from xtuner.model.transformers_models.auto import AutoModelForCausalLM
from xtuner.proving.training import (
    Trained,
    copy_trained,
    move_adapter,
    plain_training,
    relative_difference,
    train_on,
)

LLAMA = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
PUBLISHED: dict[str, tuple[str, set[str]]] = {
    "internlm": ("model.layers", LLAMA | MLP),
    "internlm2": (
        "model.layers",
        {"attention.wqkv", "attention.wo", *(f"feed_forward.w{number}" for number in (1, 2, 3))},
    ),
    "internlm3": ("model.layers", LLAMA | MLP),
    "baichuan": ("model.layers", {"self_attn.W_pack", "self_attn.o_proj"} | MLP),
    "chatglm": (
        "transformer.encoder.layers",
        {
            *("self_attention.query_key_value", "self_attention.dense"),
            *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        },
    ),
    "qwen": ("transformer.h", {"attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"}),
    "minicpm": ("model.layers", LLAMA | MLP),
    "orion": ("model.layers", LLAMA | MLP),
    "Yi": ("model.layers", LLAMA | MLP),
    "deepseek": ("model.layers", LLAMA | MLP),
}
"""By ``model_type`` where the layers are, and the linear layers that published adapters have."""
DENSE = 0
"""The layer without experts in every family."""
RANK = 4
FIRST = dict(reversed(CASES.values()))
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_family = pytest.mark.parametrize("case", FIRST.items(), ids=FIRST)
LENGTHS = (11, 3, 18)


def finetuned(llm: Any) -> SupervisedFinetune:
    """A model with the default adapter, whose second factors are not zero."""
    lora = LoraConfig(r=RANK, lora_alpha=8, task_type="CAUSAL_LM")
    model = SupervisedFinetune(llm, lora=lora, use_varlen_attn=True).train()
    move_adapter(model)
    return model


def packed_row(vocabulary: int) -> dict[str, Any]:
    ids = tokens(1, sum(LENGTHS), vocabulary)
    return {
        "input_ids": ids,
        "labels": ids,
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "cumulative_len": [torch.tensor([0, *LENGTHS]).cumsum(0).int()],
        "max_seqlen": max(LENGTHS),
    }


def of_plain_peft(llm: Any, trained: SupervisedFinetune) -> Trained:
    """Loss and gradients of peft's own layers on eager attention, each sample alone.

    Args:
        llm: the model without an adapter.
        trained: whose adapter is taken.
    """
    plain = get_peft_model(llm, trained.llm.peft_config["default"]).train()
    copy_trained(trained.llm, plain)
    rows = tokens(1, sum(LENGTHS), llm.config.vocab_size)[0].split(LENGTHS)
    return plain_training(plain, [{"input_ids": row, "labels": row} for row in rows])


def require_equal(model: SupervisedFinetune, llm: Any) -> None:
    """Loss and gradients of a packed row, through all fast paths, against plain peft."""
    wanted = of_plain_peft(llm, model)
    found = train_on(model, [packed_row(llm.config.vocab_size)])
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert found.gradients.keys() == wanted.gradients.keys()
    for name, gradient in wanted.gradients.items():
        off = relative_difference({name: found.gradients[name]}, {name: gradient})
        assert float(gradient.norm()) > 0 and off <= 2e-5, name


@each_case
def test_lora_is_pefts_own(case):
    require_equal(finetuned(build(case, attention.register())), build(case, "eager"))


@each_family
def test_qlora_is_pefts_own(case, tmp_path):
    build(case, "eager").save_pretrained(tmp_path)
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(
            tmp_path,
            quantization_config=bits,
            attn_implementation=implementation,
            dtype=torch.float32,
        )
        for implementation in (attention.register(), "eager")
    )
    model = finetuned(ours)
    assert any(type(layer).__name__ == "Params4bit" for layer in model.parameters())
    require_equal(model, theirs)


@each_family
def test_the_default_layers_are_those_of_published_adapters(case):
    folder, layers = PUBLISHED[case[0]]
    model = finetuned(build(case, attention.register()))
    prefix, suffix = f"llm.base_model.model.{folder}.{DENSE}.", ".lora_A.default.weight"
    found = {
        name.removeprefix(prefix).removesuffix(suffix)
        for name, _ in model.named_parameters()
        if name.startswith(prefix) and name.endswith(suffix)
    }
    assert found == layers


@each_family
def test_a_published_adapter_is_loaded_whole(case, tmp_path):
    """It is trained on, and written again under the same names."""
    folder, layers = PUBLISHED[case[0]]
    base = build(case, attention.register())
    weights = published_adapter(tmp_path / "adapter", base, folder, layers)
    model = SupervisedFinetune(base, peft_model=str(tmp_path / "adapter"))
    model.to_hf(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


def published_adapter(folder: Path, base: Any, prefix: str, layers: set[str]) -> dict[str, Tensor]:
    """Write an adapter of the first layer under the names that published ones have."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for layer in layers:
        linear = base.get_submodule(f"{prefix}.{DENSE}.{layer}")
        shapes = {"A": (RANK, linear.in_features), "B": (linear.out_features, RANK)}
        for factor, shape in shapes.items():
            name = f"base_model.model.{prefix}.{DENSE}.{layer}.lora_{factor}.weight"
            weights[name] = torch.randn(shape, generator=generator)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": sorted({layer.rpartition(".")[2] for layer in layers}),
        "layers_to_transform": [DENSE],
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return weights
