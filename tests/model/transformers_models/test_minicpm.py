"""MiniCPM: its factors, in the class and in the loss of training."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.golden_model import fill, tokens
from xtuner.model import SupervisedFinetune
from xtuner.model.transformers_models.auto import AutoConfig, AutoModelForCausalLM
from xtuner.utils.errors import UserError

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "scale_emb": 12,
    "dim_model_base": 8,
    "scale_depth": 1.4,
}


def build(**settings):
    config = AutoConfig.for_model("minicpm", **{**TINY, **settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    fill(model)
    return model.eval()


def test_the_loss_of_training_divides_the_logits():
    model = build()
    ids = tokens(2, 12, 96)
    wanted = model(input_ids=ids, labels=ids).loss
    trained = SupervisedFinetune(llm=model, use_activation_checkpointing=False)
    assert trained.logit_transform.scale == TINY["dim_model_base"] / TINY["hidden_size"]
    data = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(trained(data)["loss"], wanted, rtol=1e-5, atol=1e-5)


def test_embeddings_are_scaled_unless_they_are_given():
    model, ids = build(), tokens(1, 4, 96)
    plain = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model.model.embed(ids), 12 * plain)
    torch.testing.assert_close(model(ids).logits, model(inputs_embeds=12 * plain).logits)


def test_one_matrix_for_both_ends_goes_through_a_folder(tmp_path):
    model, ids = build(tie_word_embeddings=True), tokens(1, 4, 96)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("setting", [{"num_experts": 8}, {"sparse_config": {"block_size": 64}}])
def test_other_models_of_the_same_type_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        AutoConfig.for_model("minicpm", **TINY, **setting)
