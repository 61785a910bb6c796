"""Padded rows as packed ones, as on a GPU: the same loss and gradients, and nothing to wait for."""

import pytest
import torch

from tests.helpers import preference
from tests.helpers.fake_gpu import Waits, pretend
from tests.helpers.tiny import make_model, make_tokenizer
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.model import DPO, ORPO, RewardModel, SupervisedFinetune
from xtuner.model.modules.attention import register
from xtuner.model.modules.unpadding import unpadded

LENGTHS = (9, 4, 12)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def rows():
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 500, (length,), generator=draw).tolist() for length in LENGTHS]
    return [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids]


def padded_text():
    return default_collate_fn(rows())["data"]


def pairs(tokenizer, kind):
    reward = dict(is_dpo=False, is_reward=True, reward_token_id=2)
    return preference.batch(tokenizer, **(reward if kind is RewardModel else {}))


def ours(model):
    """A model whose attention is ours, as that of one which is loaded."""
    for llm in filter(None, (model.causal_lm, getattr(model, "ref_llm", None))):
        llm.set_attn_implementation(register())
    return model


def with_gradients(model, data):
    model.zero_grad()
    outputs = model(data)
    outputs["loss"].backward()
    grads = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
    return {name: value.detach() for name, value in outputs.items()}, grads


def test_rows_become_samples():
    data = padded_text()
    packed = unpadded(data)
    expected = default_collate_fn(rows(), use_varlen_attn=True)["data"]
    assert packed.keys() == expected.keys()
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(packed[name], expected[name])
    assert torch.equal(packed["cumulative_len"][0], expected["cumulative_len"][0])
    assert packed["cumulative_len"][0].dtype == torch.int32
    assert packed["max_seqlen"] == 12
    assert "attention_mask" in data


def test_positions_are_kept_or_counted():
    data = padded_text()
    data["position_ids"] += 3
    assert unpadded(data)["position_ids"][0, :9].tolist() == list(range(3, 12))
    del data["position_ids"]
    counted = [*range(9), *range(4), *range(12)]
    assert unpadded(data)["position_ids"][0].tolist() == counted


def test_supervised_rows_equal_plain_transformers(monkeypatch):
    llm = make_model("llama")
    plain = make_model("llama")
    plain.set_attn_implementation("eager")
    plain.load_state_dict(llm.state_dict())
    data = padded_text()
    labels, mask = data["labels"], data["attention_mask"]
    plain(input_ids=data["input_ids"], attention_mask=mask, labels=labels).loss.backward()
    expected = {n: w.grad for n, w in plain.named_parameters()}
    calls = []
    pretend(monkeypatch, calls)
    model = ours(SupervisedFinetune(llm, use_activation_checkpointing=False))
    model(data)  # finds out whether its packed rows are exact
    assert model.unpads
    calls.clear()
    _, found = with_gradients(model, model.prepare_batch(data, CPU))
    assert set(calls) == {12}
    assert len(found) == len(expected)
    for name, grad in expected.items():
        torch.testing.assert_close(found[f"llm.{name}"], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [DPO, ORPO, RewardModel])
def test_preferences_are_the_same(tokenizer, kind, monkeypatch):
    """And the values of a reference, which are computed ahead."""
    data = pairs(tokenizer, kind)
    model = ours(preference.moved(preference.model(kind, lora=True)))
    expected, gradients = with_gradients(model, data)
    pretend(monkeypatch)
    model.probed_rows = frozenset()
    model(data)
    prepared = model.prepare_batch(data, CPU)
    assert prepared["input_ids"].shape[0] == 1
    found, grads = with_gradients(model, prepared)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert grads.keys() == gradients.keys()
    for name, grad in gradients.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-6)
    if kind is DPO:
        torch.testing.assert_close(
            model(prepared, mode="reference"), model(data, mode="reference"), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", [SupervisedFinetune, DPO, ORPO, RewardModel])
@pytest.mark.parametrize("packed", [False, True])
def test_the_cpu_waits_for_nothing(tokenizer, kind, packed, monkeypatch):
    """Neither in the forward pass nor in the backward pass, whose layers are computed again."""
    pretend(monkeypatch)
    if kind is SupervisedFinetune:
        data = default_collate_fn(rows(), use_varlen_attn=packed)["data"]
    else:
        reward = dict(is_dpo=False, is_reward=True, reward_token_id=2)
        data = preference.batch(tokenizer, packed, **(reward if kind is RewardModel else {}))
    model = ours(preference.model(kind, lora=True, use_activation_checkpointing=True)).train()
    items = model.num_items(data)
    model(model.prepare_batch(data, CPU), num_items_in_batch=items)
    prepared = model.prepare_batch(data, CPU)
    with Waits() as waits:
        model(prepared, num_items_in_batch=items)["loss"].backward()
    assert waits.found == {}


def test_rows_of_one_length_are_packed_too(monkeypatch):
    pretend(monkeypatch)
    data = default_collate_fn([rows()[0]] * 2)["data"]
    model = ours(SupervisedFinetune(make_model("llama")))
    expected = model(data)["loss"]
    prepared = model.prepare_batch(data, CPU)
    assert prepared["input_ids"].shape == (1, 18)
    torch.testing.assert_close(model(prepared)["loss"], expected)


def test_without_a_gpu_a_batch_is_left_as_it_is():
    data = padded_text()
    assert SupervisedFinetune(make_model("llama")).prepare_batch(data, CPU) is data


def test_a_model_whose_packed_samples_mix_keeps_its_padding(monkeypatch):
    pretend(monkeypatch)
    model = ours(SupervisedFinetune(make_model("llama")))
    true = model.inputs
    # as an architecture that loses cu_seqlens on the way to its attention
    monkeypatch.setattr(
        model, "inputs", lambda data: {k: v for k, v in true(data).items() if "seq_lens" not in k}
    )
    data = padded_text()
    model(data)
    assert model.unpads is False
    assert "attention_mask" in model.prepare_batch(data, CPU)


def test_another_attention_finds_samples_by_their_positions(monkeypatch):
    """So it must not get a mask of ones, which tells transformers that there are none."""
    pretend(monkeypatch)
    model = SupervisedFinetune(make_model("llama"))
    data = default_collate_fn(rows(), use_varlen_attn=True)["data"]
    prepared = model.prepare_batch(data, CPU)
    assert "attention_mask" not in model.inputs(prepared)
    prepared = ours(model).prepare_batch(data, CPU)
    assert bool(model.inputs(prepared)["attention_mask"].all())
