"""The verdict on written mixtures of experts: routers may choose others, weights may not be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.helpers.tiny import make_model, make_tokenizer
from xtuner.entry_point import main
from xtuner.export import verify
from xtuner.tools.model_converters import merge
from xtuner.utils.errors import UserError

EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "initializer_range": 0.2,
}
SEEDS = {"mixtral": 1, "qwen3_moe": 4}
"""With which a router chooses another expert after rounding."""
FILE = "model.safetensors"


def adapted(base: Path) -> PeftModel:
    """The base with an adapter on attention and on all experts, every number off its start."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(model, lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(scope="module", params=SEEDS)
def folders(request, tmp_path_factory) -> dict[str, Path]:
    """Base in bf16, adapter and what ``convert merge`` made of them, with its own verdict."""
    root = tmp_path_factory.mktemp(request.param)
    folders = {name: root / name for name in ("base", "adapter", "merged")}
    torch.manual_seed(SEEDS[request.param])
    make_model(request.param, **EXPERTS).to(torch.bfloat16).save_pretrained(folders["base"])
    make_tokenizer().save_pretrained(folders["base"])
    adapted(folders["base"]).save_pretrained(folders["adapter"])
    assert main(["convert", "merge", *map(str, folders.values())]) == 0
    return folders


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def verdict(folders: dict[str, Path]) -> None:
    merge._verify(folders["base"], folders["adapter"], folders["merged"], False)


def test_a_right_merge_passes_though_its_router_chooses_another_expert(folders, capsys):
    verdict(folders)
    assert "each weight is the expected one, rounded to bfloat16" in capsys.readouterr().out
    ids = verify.probe_ids(512)
    expected = PeftModel.from_pretrained(load(folders["base"]), folders["adapter"])
    difference = verify.compare(
        verify.compute_logits(expected, ids), verify.compute_logits(load(folders["merged"]), ids)
    )
    assert difference.relative > verify.TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("fault", ["scale", "layer", "router"])
def test_a_wrong_merge_is_refused(fault, folders, tmp_path):
    base = load_file(folders["base"] / FILE)
    tensors = load_file(folders["merged"] / FILE)
    expert = ".layers.0.mlp.experts.3." if "qwen" in str(folders["base"]) else ".0.block_sparse_moe"
    if fault == "scale":  # lora_alpha / r, which is 2, is forgotten in one matrix of one expert
        name = next(name for name in tensors if expert in name and "experts.3." in name)
        tensors[name] = (base[name].float() + tensors[name].float()).div(2).to(torch.bfloat16)
    elif fault == "layer":
        name = "model.layers.1.self_attn.v_proj.weight"
        assert not torch.equal(tensors[name], base[name])
        tensors[name] = base[name]
    else:
        name = next(name for name in tensors if name.endswith(".gate.weight"))
        tensors[name] = -tensors[name]
    wrong = tmp_path / "wrong"
    shutil.copytree(folders["merged"], wrong)
    save_file(tensors, wrong / FILE, metadata={"format": "pt"})
    with pytest.raises(UserError, match="not those of the expected model"):
        verdict(folders | {"merged": wrong})


def test_a_merge_that_is_not_base_plus_adapter_is_refused(folders, monkeypatch):
    """The exact weights are peft's; logits say whether peft merged them right."""
    exact = verify.own_weights(load(folders["base"]))
    model = load(folders["base"])
    ids = verify.probe_ids(512)
    other = torch.randn_like(verify.compute_logits(model, ids)) * 9
    with pytest.raises(UserError, match="is not the same model as base"):
        verify.check_experts(
            model,
            exact,
            lambda found: verify.compare(other, verify.compute_logits(found, ids)),
            torch.bfloat16,
            "base + adapter",
        )


def test_weights_of_other_names_or_shapes_and_nan_are_refused():
    exact = {"a": torch.ones(3), "b": torch.ones(2)}
    verify.check_weights(exact, {"a": torch.ones(3) * 1.003, "b": torch.ones(2)}, torch.bfloat16)
    for found in (
        {"a": torch.ones(3)},
        {"a": torch.ones(4), "b": torch.ones(2)},
        {"a": torch.ones(3) * 1.003, "b": torch.ones(2)},
        {"a": torch.full((3,), torch.nan), "b": torch.ones(2)},
    ):
        with pytest.raises(UserError):
            verify.check_weights(exact, found, torch.float32)


def test_experts_are_known_by_structure():
    kinds = {"mixtral": True, "qwen3_moe": True, "granitemoe": True, "llama": False}
    for kind, expected in kinds.items():
        with torch.device("meta"):
            settings = EXPERTS if expected else {}
            assert verify.has_experts(make_model(kind, **settings)) is expected, kind


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> dict[str, Path]:
    """A dense base in bf16 with little in its adapter, and what ``convert merge`` made of them."""
    root = tmp_path_factory.mktemp("dense")
    folders = {name: root / name for name in ("base", "adapter", "merged")}
    torch.manual_seed(0)
    make_model().to(torch.bfloat16).save_pretrained(folders["base"])
    make_tokenizer().save_pretrained(folders["base"])
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(load(folders["base"]), lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folders["adapter"])
    assert main(["convert", "merge", *map(str, folders.values())]) == 0
    return folders


def test_a_wrong_layer_of_a_dense_model_is_refused_though_the_logits_are_near(dense, tmp_path):
    base, tensors = load_file(dense["base"] / FILE), load_file(dense["merged"] / FILE)
    name = "model.layers.1.mlp.down_proj.weight"  # its lora_alpha / r is forgotten
    tensors[name] = (base[name].float() + tensors[name].float()).div(2).to(torch.bfloat16)
    wrong = tmp_path / "wrong"
    shutil.copytree(dense["merged"], wrong)
    save_file(tensors, wrong / FILE, metadata={"format": "pt"})
    ids = verify.probe_ids(512)
    near = verify.compare(
        verify.compute_logits(load(wrong), ids), verify.compute_logits(load(dense["merged"]), ids)
    )
    assert near.relative < verify.TOLERANCE[torch.bfloat16]
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        verdict(dense | {"merged": wrong})


def test_tied_weights_are_one_in_the_file(tmp_path):
    torch.manual_seed(0)
    model = make_model("qwen3", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    stored = verify.stored_weights(state, verify.Weights(tmp_path))
    assert stored is not None and len(stored) == len(state)
    verify.check_weights(state, stored, torch.float32)
    assert verify.stored_weights(state | {"other": torch.ones(1)}, verify.Weights(tmp_path)) is None
    verify.untie(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
