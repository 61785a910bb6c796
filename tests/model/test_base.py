"""FinetuneModel: the modes of forward, what is trained and saved, the arguments of the model."""

import pytest
import torch
from peft import LoraConfig

from tests.helpers.tiny import make_model
from xtuner.model import SupervisedFinetune
from xtuner.model.base import FinetuneModel, packed_cu_seqlens, text_inputs, trained_weights

IDS = torch.arange(3, 23)[None]
BATCH = {"input_ids": IDS, "labels": IDS.clone()}


def llama():
    torch.manual_seed(0)
    return make_model()


def test_the_modes_of_forward():
    model = SupervisedFinetune(llama()).eval()
    logits = model.llm(input_ids=IDS).logits
    assert torch.equal(model(BATCH, mode="tensor").logits, logits)
    (predicted,) = model(BATCH, mode="predict")
    assert torch.equal(predicted["logits"], logits)
    loss = model(BATCH)["loss"]
    twice = model(BATCH, num_items_in_batch={"tokens": 2 * 19})["loss"]
    torch.testing.assert_close(twice * 2, loss)
    with pytest.raises(NotImplementedError, match="loss, predict, tensor"):
        model(BATCH, mode="generate")


def test_a_loss_is_of_a_subclass():
    model = FinetuneModel(llama())
    for call in (model.num_items, model):
        with pytest.raises(NotImplementedError):
            call(BATCH)


def test_packed_rows_give_cu_seqlens_in_place_of_a_mask():
    cu_seqlens = torch.tensor([0, 5, 20], dtype=torch.int32)
    mask = torch.ones_like(IDS)
    plain = text_inputs({**BATCH, "attention_mask": mask})
    assert set(plain) == {"input_ids", "attention_mask"}
    packed = text_inputs(
        {**BATCH, "attention_mask": mask, "cumulative_len": [cu_seqlens], "max_seqlen": 15}
    )
    assert "attention_mask" not in packed
    assert packed["cu_seq_lens_q"] is packed["cu_seq_lens_k"] is cu_seqlens
    assert packed["max_length_q"] == packed["max_length_k"] == 15
    assert packed_cu_seqlens({"cumulative_len": cu_seqlens}) is cu_seqlens
    assert packed_cu_seqlens(BATCH) is None


def test_the_state_is_what_is_trained_whatever_the_prefix():
    model = SupervisedFinetune(llama(), lora=LoraConfig(r=2, task_type="CAUSAL_LM"))
    state = model.state_dict()
    assert state
    assert all("lora_" in name and name.startswith("llm.") for name in state)
    assert list(model.state_dict(prefix="model.")) == [f"model.{name}" for name in state]
    assert len(SupervisedFinetune(llama()).state_dict()) > len(list(llama().parameters())) - 1
    frozen = torch.nn.Linear(2, 2)
    frozen.bias.requires_grad_(False)
    assert list(trained_weights(frozen, frozen.state_dict())) == ["weight"]


def test_a_head_that_computes_logits_by_code_of_its_own_is_noticed(caplog):
    model = SupervisedFinetune(llama())
    expected = model(BATCH)["loss"]
    assert model._separate_head
    llm = llama()
    true = llm.forward

    def forward(*args, **kwargs):
        outputs = true(*args, **kwargs)
        outputs.logits = outputs.logits * 3
        return outputs

    llm.forward = forward
    other = SupervisedFinetune(llm)
    loss = other(BATCH)["loss"]
    assert other._separate_head is False
    assert "code of its own" in caplog.text
    assert not torch.isclose(loss, expected, rtol=1e-3)
