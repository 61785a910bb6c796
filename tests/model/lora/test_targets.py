"""The layers that get an adapter by default: never heads, routers, experts or towers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.architectures import BASE, VOCABULARY, make_architecture
from tests.helpers.tiny import make_model
from xtuner.model.lora.targets import (
    default_targets,
    not_reached_by_text,
    set_default_targets,
)
from xtuner.model.modules import attention
from xtuner.model.sft import SupervisedFinetune

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
EXPECTED = {
    "llama": ATTENTION | MLP,
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "mixtral": ATTENTION,
    "qwen2_moe": ATTENTION,
    "qwen3_moe": ATTENTION,
    "qwen3_next": ATTENTION | {"in_proj_qkvz", "in_proj_ba", "out_proj"},
    "glm4_moe": ATTENTION,
    "hunyuan_v1_moe": ATTENTION,
    "ernie4_5_moe": ATTENTION,
    "dots1": ATTENTION,
    "llama4_text": ATTENTION,
    "phimoe": ATTENTION,
    "minimax_m2": ATTENTION,
    "olmoe": ATTENTION,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "glm4_moe_lite": LATENT,
    "nemotron_h": ATTENTION | {"in_proj"},
    "falcon_h1": ATTENTION | MLP | {"in_proj"},
    "lfm2": ATTENTION - {"o_proj"} | {"out_proj", "in_proj", "w1", "w2", "w3"},
}


def lora_model(
    kind: str, implementation: str | None = None, **settings: object
) -> SupervisedFinetune:
    return SupervisedFinetune(
        make_architecture(kind, attention=implementation or attention.register()),
        lora=LoraConfig(r=4, lora_dropout=0.1, task_type="CAUSAL_LM", **settings),
    )


def adapted(model: SupervisedFinetune) -> set[str]:
    return {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_default_layers_of_an_architecture_train(kind):
    model = lora_model(kind)
    assert {name.rpartition(".")[2] for name in adapted(model)} == EXPECTED[kind]
    tokens = getattr(model.causal_lm.config, "attention_chunk_size", None) or 16
    ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model({"input_ids": ids, "labels": ids}, mode="loss")["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(
        weight.grad is not None for name, weight in model.named_parameters() if "lora_B" in name
    )


def test_all_linear_means_the_same():
    assert adapted(lora_model("qwen3_moe", target_modules="all-linear")) == adapted(
        lora_model("qwen3_moe")
    )


def test_explicit_targets_stay():
    names = adapted(lora_model("llama", target_modules=["q_proj"]))
    assert {name.rpartition(".")[2] for name in names} == {"q_proj"}


@pytest.mark.parametrize("targets", [["q_proj", "gate_proj", "up_proj", "down_proj"], r".*_proj"])
def test_experts_are_adapted_on_request_without_dropout(targets, caplog):
    model = lora_model("qwen3_moe", target_modules=targets)
    assert any("experts" in name for name in adapted(model))
    assert "lora_dropout=0.1 is set to 0" in caplog.text


def multimodal():
    text = {**BASE, "layer_types": ["full_attention"] * 2}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    return AutoModelForCausalLM.from_config(config)


IDS = torch.arange(5, 25)[None]
TEXT_ROWS = {"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}


@pytest.mark.parametrize(
    "lora",
    [
        None,
        {},
        {"target_modules": ["q_proj", "out_proj"]},
        {"target_modules": r".*(self_attn|mlp)\..*(proj|fc1)"},
        {"target_modules": ["q_proj", "fc1"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ],
    ids=["full", "default", "names", "pattern", "excluding"],
)
def test_everything_that_is_trained_gets_a_gradient_from_text(lora):
    """A parameter without one would leave the other processes waiting."""
    settings = None if lora is None else LoraConfig(r=4, task_type="CAUSAL_LM", **lora)
    model = SupervisedFinetune(multimodal(), lora=settings)
    model(TEXT_ROWS)["loss"].backward()
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    assert trained and all(weight.grad is not None for weight in trained.values())
    assert not any("vision" in name or "projector" in name for name in trained)
    assert any("language_model" in name for name in trained)
    if lora and "exclude_modules" in lora:
        assert any("layers.1.self_attn.q_proj" in name for name in trained)
        assert not any("layers.0.self_attn.q_proj" in name for name in trained)


def test_a_model_of_text_is_reached_everywhere():
    assert not_reached_by_text(make_model()) == []


def test_the_vision_tower_of_a_multimodal_model_gets_no_adapter():
    llm = multimodal()
    linear = {name for name, layer in llm.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert any("vision" in name for name in linear)
    targets = default_targets(llm)
    assert {*targets.target_modules} >= ATTENTION
    model = SupervisedFinetune(llm, lora=LoraConfig(r=4, task_type="CAUSAL_LM"))
    assert adapted(model) and not any("vision" in name for name in adapted(model))


def test_layers_that_text_never_calls_get_no_adapter_and_are_frozen():
    """Attention to an encoder's states (BART), poolers (BigBird), weights used alone (Mamba)."""
    for kind, left in (
        ("bart", "encoder_attn"),
        ("big_bird", "pooler"),
        ("mamba", "dt_proj"),
        ("gemma3n_text", "correction_coefs"),
        ("git", "image_encoder"),
    ):
        model = lora_model(kind, implementation="eager" if kind == "git" else None)
        assert not any(left in name for name in adapted(model)), kind
    full = SupervisedFinetune(make_architecture("bart", attention="eager"))
    frozen = [name for name, weight in full.named_parameters() if not weight.requires_grad]
    assert frozen and all("encoder_attn" in name for name in frozen)
    assert "layers.0.encoder_attn" in " ".join(not_reached_by_text(full.llm))


def test_compressed_attention_gives_every_adapter_a_gradient():
    """DeepSeek-V4's compressors get none from rows shorter than their window of 128 tokens."""
    rates = {"heavily_compressed_attention": 8, "compressed_sparse_attention": 4}
    llm = make_architecture("deepseek_v4", attention="eager", compress_rates=rates)
    lora = LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    set_default_targets(lora, llm)
    model = get_peft_model(llm, lora)
    ids = torch.arange(5, 45)[None]
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("compressor.kv_proj" in name for name in adapters)
    assert not any("indexer" in name for name in adapters)  # it selects keys: it has no gradient
    for tokens, reached in (40, True), (7, False):
        model.zero_grad(set_to_none=True)
        model(input_ids=ids[:, :tokens], labels=ids[:, :tokens], use_cache=False).loss.backward()
        without = {name for name, p in adapters.items() if p.grad is None or not p.grad.any()}
        assert all("layers.0.self_attn.compressor.kv_proj" in name for name in without)
        assert bool(without) is not reached
