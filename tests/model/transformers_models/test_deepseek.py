"""DeepSeekMoE: its experts' gradients, and the router's balance loss."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.golden_model import fill, tokens
from xtuner.model import SupervisedFinetune
from xtuner.model.transformers_models.auto import AutoConfig, AutoModelForCausalLM
from xtuner.model.transformers_models.deepseek.modeling_deepseek import balance_loss
from xtuner.utils.errors import UserError

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(**settings):
    config = AutoConfig.for_model("deepseek", **{**TINY, **settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    fill(model)
    return model


def test_names_of_tensors_are_the_hubs():
    names = {name for name in build().state_dict() if ".layers." in name and ".mlp." in name}
    parts = [f"{part}_proj.weight" for part in ("gate", "up", "down")]
    wanted = {f"model.layers.0.mlp.{part}" for part in parts}
    for layer in (1, 2):
        inside = [f"experts.{expert}" for expert in range(4)] + ["shared_experts"]
        wanted |= {
            f"model.layers.{layer}.mlp.{expert}.{part}" for expert in inside for part in parts
        }
        wanted.add(f"model.layers.{layer}.mlp.gate.weight")
    assert names == wanted


def test_an_expert_without_tokens_gets_a_gradient_of_zeros():
    model = build()
    with torch.no_grad():
        gate = model.model.layers[1].mlp.gate.weight
        gate[3] = -gate[:3].sum(0)  # not the largest for any token below
    model(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()
    gradients = [expert.up_proj.weight.grad for expert in model.model.layers[1].mlp.experts]
    assert all(gradient is not None for gradient in gradients)
    assert any(not gradient.any() for gradient in gradients)


def reference_balance(logits, top_k):
    """Equations 12 to 14 of the DeepSeekMoE paper, for one sample (T, E)."""
    tokens_, experts = logits.shape
    scores = logits.softmax(-1)
    total = 0.0
    for expert in range(experts):
        chosen = sum(expert in score.topk(top_k).indices for score in scores)
        total += experts / (top_k * tokens_) * chosen * scores[:, expert].mean()
    return total


def test_the_balance_loss_is_the_papers_mean_over_samples():
    config = AutoConfig.for_model("deepseek", **TINY)
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(9, 4, generator=generator) for _ in range(2)]
    samples = torch.tensor([0, 0, 0, 0, 1, 1, 1, -1, -1])
    wanted = sum(
        (reference_balance(layer[:4], 2) + reference_balance(layer[4:7], 2)) / 2 for layer in logits
    )
    torch.testing.assert_close(balance_loss(logits, samples, config), wanted)
    config.seq_aux = False
    wanted = sum(reference_balance(layer[:7], 2) for layer in logits)
    torch.testing.assert_close(balance_loss(logits, samples, config), wanted)


def test_the_balance_loss_of_a_packed_row_is_that_of_its_samples():
    model = build(output_router_logits=True)
    ids, lengths = tokens(1, 12, 96), (5, 7)
    rows = torch.nn.utils.rnn.pad_sequence(ids[0].split(lengths), batch_first=True)
    mask = torch.tensor([[1] * 5 + [0] * 2, [1] * 7])
    padded = model(input_ids=rows, attention_mask=mask).aux_loss
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    model.set_attn_implementation("xtuner")
    packed = model(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=7,
        max_length_k=7,
    ).aux_loss
    torch.testing.assert_close(packed, padded)


@pytest.mark.parametrize("routes", [False, True])
def test_the_loss_of_training_has_the_balance_loss_if_asked_for(routes):
    model = build(output_router_logits=routes, aux_loss_alpha=0.5)
    ids = tokens(2, 12, 96)
    outputs = model(input_ids=ids, labels=ids)
    plain = model(input_ids=ids, labels=ids, output_router_logits=False).loss
    assert (outputs.aux_loss is not None) is routes
    added = 0.5 * outputs.aux_loss if routes else 0.0
    torch.testing.assert_close(outputs.loss, plain + added)
    trained = SupervisedFinetune(llm=model, use_activation_checkpointing=False)
    data = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(trained(data)["loss"], outputs.loss, rtol=1e-5, atol=1e-5)


def test_other_scores_are_refused():
    with pytest.raises(UserError, match="scoring_func"):
        AutoConfig.for_model("deepseek", **TINY, scoring_func="sigmoid")
