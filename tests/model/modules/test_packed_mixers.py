"""Layers that mix tokens without attention train packed rows as they train each sample alone."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.architectures import VOCABULARY, make_architecture
from xtuner.model import probe
from xtuner.model.modules import attention, packed_mixers
from xtuner.model.modules.packed_mixers import find_mixers, split_mixers
from xtuner.model.sft import SupervisedFinetune
from xtuner.utils.errors import UserError

LENGTHS = (7, 9, 5)
MIXERS = {
    "bamba": ["mamba"],
    "falcon_h1": ["mamba", "mamba"],
    "granitemoehybrid": ["mamba"],
    "lfm2": ["conv"],
    "lfm2_moe": ["conv"],
    "mamba2": ["mixer", "mixer"],
    "minimax": ["self_attn"],
    "nemotron": ["self_attn", "self_attn"],
    "nemotron_h": ["mixer"],
    "olmo_hybrid": ["linear_attn"],
    "qwen3_5_moe_text": ["linear_attn"],
    "qwen3_5_text": ["linear_attn"],
    "qwen3_next": ["linear_attn"],
    "recurrent_gemma": ["temporal_block", "temporal_block"],
}


def samples() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (length,), generator=random) for length in LENGTHS]


def batch_of(rows: list[torch.Tensor]) -> dict:
    """The rows packed into one; with labels."""
    ids = torch.cat(rows)[None]
    cu_seqlens = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).to(torch.int32)
    return {
        "input_ids": ids,
        "labels": ids.clone(),
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "cumulative_len": [cu_seqlens],
        "max_seqlen": max(len(row) for row in rows),
    }


def mixers_of(model: SupervisedFinetune) -> list[str]:
    two = batch_of(samples()[:2])
    model.eval()
    with torch.no_grad():
        return find_mixers(model.causal_lm, lambda: model.hidden_states(two), LENGTHS[0])


def loss_and_gradients(
    model: SupervisedFinetune, batches: list[dict]
) -> tuple[float, torch.Tensor]:
    model.train()
    model.zero_grad()
    total = {"tokens": sum(LENGTHS) - len(LENGTHS)}
    loss = 0.0
    for batch in batches:
        share = model(batch, mode="loss", num_items_in_batch=total)["loss"]
        share.backward()
        loss += float(share.detach())
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return loss, torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", MIXERS)
def test_packed_rows_train_as_each_sample_alone(kind, checkpointing, caplog):
    llm = make_architecture(kind, attention=attention.register())
    model = SupervisedFinetune(llm, use_activation_checkpointing=checkpointing)
    assert [name.rpartition(".")[2] for name in mixers_of(model)] == MIXERS[kind]
    loss, gradients = loss_and_gradients(model, [batch_of(samples())])
    changed = [record for record in caplog.records if record.name == probe.logger.name]
    assert not changed  # neither called for each sample nor given its own attention
    wanted, alone = loss_and_gradients(model, [batch_of([row]) for row in samples()])
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert (gradients - alone).norm() / alone.norm() < 1e-5


def test_plain_attention_is_left_alone():
    model = SupervisedFinetune(make_architecture("qwen3_moe", attention=attention.register()))
    before = [module.forward for module in model.modules()]
    assert mixers_of(model) == []
    after = [module.forward for module in model.modules()]
    assert before == after


def test_names_of_weights_stay():
    llm = make_architecture("lfm2", attention=attention.register())
    names = set(llm.state_dict())
    model = SupervisedFinetune(llm, use_activation_checkpointing=False)
    split_mixers(model.causal_lm, mixers_of(model))
    assert set(llm.state_dict()) == names


OURS, OWN = attention.register(), "eager"
CALLED_FOR_EACH = {
    "bart": (OURS, dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)),
    "mamba": (OWN, {}),
    "megatron-bert": (
        OWN,
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "is_decoder": True},
    ),
    "deepseek_v4": (OURS, {}),
}
"""Position embeddings without position_ids, layers without cu_seqlens, a head that does not hand
them on, masks of its own."""


@pytest.mark.parametrize("kind", CALLED_FOR_EACH)
def test_a_model_that_mixes_elsewhere_is_called_for_each_sample(kind, caplog):
    implementation, settings = CALLED_FOR_EACH[kind]
    llm = make_architecture(kind, attention=implementation, **settings)
    model = SupervisedFinetune(llm, use_varlen_attn=True)
    loss, gradients = loss_and_gradients(model, [batch_of(samples())])
    assert f"{type(llm).__name__} computes packed samples one by one" in caplog.text
    wanted, alone = loss_and_gradients(model, [batch_of([row]) for row in samples()])
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert (gradients - alone).norm() / alone.norm() < 1e-5


def test_where_it_cannot_be_it_is_refused_and_left_as_it_was(monkeypatch):
    llm = make_architecture("mamba", attention="eager")
    for module, name, value in (
        (probe, "is_sharded", lambda llm: True),  # ranks make the same calls
        (packed_mixers, "_sliced", lambda value, part, tokens: value),
    ):
        model = SupervisedFinetune(llm, use_activation_checkpointing=False, use_varlen_attn=True)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            with pytest.raises(UserError, match="not computed separately"):
                model(batch_of(samples()))
    assert not {"forward"} & {*vars(llm), *vars(llm.base_model)}
