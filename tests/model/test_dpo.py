"""DPO: equal to plain transformers, packed or not; its reference is the model before training."""

import math

import pytest
import torch
from peft import LoraConfig
from torch.nn.functional import logsigmoid

from tests.helpers.preference import (
    LORA,
    batch,
    dataset,
    model,
    moved,
    plain_log_probs,
    with_dropout,
)
from tests.helpers.tiny import make_model, make_tokenizer
from xtuner.dataset.collate_fns import preference_collate_fn
from xtuner.model.dpo import DPO
from xtuner.model.modules import preference_losses


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_dpo_equals_plain_transformers(tokenizer, packed, lora):
    built = moved(model(lora=lora))
    data = batch(tokenizer, packed)
    loss = built(data)["loss"]
    loss.backward()
    found = {n: w.grad.clone() for n, w in built.named_parameters() if w.grad is not None}
    built.zero_grad()
    padded = batch(tokenizer)
    with torch.no_grad():
        if lora:
            with built.llm.disable_adapter():
                reference, _ = plain_log_probs(built.llm, padded)
        else:
            reference, _ = plain_log_probs(built.ref_llm, padded)
    ratios = plain_log_probs(built.llm, padded)[0] - reference
    expected = -logsigmoid(0.1 * (ratios[::2] - ratios[1::2])).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert found
    for name, weight in built.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(found[name], weight.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss_type", list(preference_losses.DPO_LOSSES))
def test_at_the_start_policy_and_reference_agree(tokenizer, loss_type):
    data = batch(tokenizer)
    full, adapter = (model(lora=lora, loss_type=loss_type)(data) for lora in (False, True))
    for key in full:
        torch.testing.assert_close(full[key], adapter[key], rtol=1e-4, atol=1e-5)
    assert full["reward_margin"].abs() < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_precomputed_equals_live(tokenizer, packed):
    made = dataset(tokenizer, use_varlen_attn=packed, max_packed_length=1024)
    data = preference_collate_fn(list(made), use_varlen_attn=packed)["data"]
    live, ahead = model(), model(precompute_reference=True)
    assert ahead.ref_llm is None
    values = ahead(data, mode="reference").tolist()
    ahead.llm.load_state_dict(moved(live).llm.state_dict())
    with pytest.raises(RuntimeError, match="the batch has no ref_chosen_logps"):
        ahead(data)  # never with the trained model in place of the reference
    if packed:
        columns = [{"ref_chosen_logps": values[::2], "ref_rejected_logps": values[1::2]}]
    else:
        pairs = zip(values[::2], values[1::2], strict=True)
        columns = [{"ref_chosen_logps": a, "ref_rejected_logps": b} for a, b in pairs]
    rows = [{**row, **added} for row, added in zip(made, columns, strict=True)]
    found = ahead(preference_collate_fn(rows, use_varlen_attn=packed)["data"])
    for key, value in live(data).items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


def test_the_reference_has_no_dropout(tokenizer):
    data = batch(tokenizer)
    built = with_dropout().train()
    one, other = built.reference_logps(data), built.reference_logps(data)
    assert torch.equal(one, other)
    assert built.training and built.llm.training
    policy, again = built.completion_logps(data), built.completion_logps(data)
    assert not torch.equal(policy.log_probs, again.log_probs)


def test_a_frozen_adapter_that_is_the_reference_has_no_dropout(tokenizer):
    data = batch(tokenizer)
    built = with_dropout()
    built.keep_initial_adapter()
    expected = built.eval().completion_logps(data).log_probs.detach()
    moved(built.train())
    assert torch.equal(built.reference_logps(data), expected)
    assert torch.equal(built.reference_logps(data), expected)


def test_a_frozen_reference_does_not_follow_train():
    built = model().train()
    assert built.llm.training
    assert not any(module.training for module in built.ref_llm.modules())


def test_a_frozen_adapter_is_neither_trained_nor_saved(tokenizer, tmp_path):
    built = with_dropout(p=0.0)
    before = set(built.state_dict())
    built.keep_initial_adapter()
    data = batch(tokenizer)
    built(data)["loss"].backward()
    trained = [name for name, weight in built.named_parameters() if weight.grad is not None]
    assert trained and not any("reference" in name for name in trained)
    assert set(built.state_dict()) == before
    built.to_hf(tmp_path / "hf")
    assert sorted(file.name for file in (tmp_path / "hf").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("init", [True, "gaussian", "pissa"])
def test_the_reference_is_the_model_before_training(tokenizer, init):
    """PiSSA moves a part of the base into the adapter: without it the base is another model."""
    data = batch(tokenizer)
    torch.manual_seed(0)
    expected, _ = plain_log_probs(make_model("llama"), data)
    torch.manual_seed(0)
    built = DPO(make_model("llama"), lora=LoraConfig(**LORA, init_lora_weights=init))
    for policy in (built, moved(built)):
        torch.testing.assert_close(policy.reference_logps(data), expected, rtol=1e-4, atol=1e-3)
    assert abs(float(built(data)["reward_margin"])) > 1e-3


def test_kto_pair_has_no_gradient_through_its_kl():
    """Against finite differences of the loss with the KL held."""
    ratios = torch.tensor([0.7, 0.4, -0.2, 0.9], dtype=torch.float64, requires_grad=True)

    def loss(values, kl):
        chosen, rejected = values[::2], values[1::2]
        liked = 1 - torch.sigmoid(0.5 * (chosen - kl[1]))
        disliked = 1 - torch.sigmoid(0.5 * (kl[0] - rejected))
        return ((liked + disliked) / 2).sum()

    pairs = preference_losses.Ratios(ratios[::2], ratios[1::2])
    preference_losses.kto_pair(pairs, 0.5, 0.0).sum().backward()
    kl = [ratios[::2].detach().mean().clamp(min=0), ratios[1::2].detach().mean().clamp(min=0)]
    assert all(float(each) > 0 for each in kl)
    for place in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[place] = 1e-6
        slope = (loss(ratios.detach() + step, kl) - loss(ratios.detach() - step, kl)) / 2e-6
        assert float(ratios.grad[place]) == pytest.approx(float(slope), rel=1e-5)


def test_a_reference_is_not_saved(tokenizer):
    built = model()
    assert built.ref_llm is not None
    assert all(name.startswith("llm.") for name in built.state_dict())
    assert not any(weight.requires_grad for weight in built.ref_llm.parameters())


def test_a_token_with_id_0_counts():
    built = model()
    ids = torch.tensor([[5, 6, 0, 7], [5, 6, 8, 9]])
    labels = torch.tensor([[-100, -100, 0, 7], [-100, -100, 8, 9]])
    data = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    logps = built.completion_logps(data)
    assert logps.tokens.tolist() == [2, 2]
    torch.testing.assert_close(logps.log_probs, plain_log_probs(built.llm, data)[0])


def test_losses_by_hand():
    ratios = preference_losses.Ratios(torch.tensor([1.0]), torch.tensor([-0.5]))
    margin = 0.5 * 1.5
    s = 1 / (1 + math.exp(-margin))
    expected = {
        "sigmoid": -0.9 * math.log(s) - 0.1 * math.log(1 - s),
        "robust": (-0.9 * math.log(s) + 0.1 * math.log(1 - s)) / 0.8,
        "hinge": 1 - margin,
        "ipo": (1.5 - 1.0) ** 2,
        "kto_pair": (
            1 - 1 / (1 + math.exp(-0.5 * (1 - 0))) + 1 - 1 / (1 + math.exp(-0.5 * (1 + 0.5)))
        )
        / 2,
        "sppo_hard": (1 - 1.0) ** 2 + (-0.5 + 1.0) ** 2,
        "nca_pair": math.log(1 + math.exp(-0.5))
        + 0.5 * math.log(1 + math.exp(0.5))
        + 0.5 * math.log(1 + math.exp(-0.25)),
    }
    for name, value in expected.items():
        smoothing = 0.1 if name in ("sigmoid", "robust") else 0.0
        found = preference_losses.DPO_LOSSES[name](ratios, 0.5, smoothing)
        assert found.item() == pytest.approx(value, rel=1e-5), name
