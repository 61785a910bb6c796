"""Qwen of 2023: how rows beyond the trained length are scaled, and when not."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers.golden_model import fill, tokens
from xtuner.model.transformers_models.auto import AutoConfig, AutoModelForCausalLM
from xtuner.model.transformers_models.rotary import sample_lengths
from xtuner.utils.errors import UserError

TRAINED = 8
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "seq_length": TRAINED,
}


def build(**settings):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen", **{**TINY, **settings}))
    fill(model)
    return model.eval()


def test_lengths_of_samples_are_read_from_positions():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 0, 0, 1, 2, 3]])
    assert sample_lengths(positions).tolist() == [[3, 3, 3, 1, 2, 2], [1, 1, 4, 4, 4, 4]]


@pytest.mark.parametrize(("length", "alpha"), [(9, 3), (16, 3), (17, 7), (32, 7), (33, 15)])
def test_the_base_grows_with_each_doubling(length, alpha):
    rotary = build().transformer.rotary_emb
    assert rotary.ntk_alpha(torch.arange(length)[None]).unique().tolist() == [alpha]
    assert rotary.ntk_alpha(torch.arange(TRAINED)[None]) is None


def test_a_short_sample_beside_a_long_one_is_not_scaled():
    positions = torch.cat((torch.arange(5), torch.arange(20)))[None]
    alpha = build().transformer.rotary_emb.ntk_alpha(positions).flatten().tolist()
    assert alpha == [1.0] * 5 + [7.0] * 20


def test_queries_are_scaled_by_the_logarithm_of_their_position():
    factors = build().transformer.query_factors(torch.arange(12)[None]).flatten()
    assert factors[:TRAINED].tolist() == [1.0] * TRAINED
    assert factors[11].item() == pytest.approx(math.log(12) / math.log(TRAINED), rel=1e-6)


def test_training_scales_nothing():
    scaled, plain = build(), build(use_dynamic_ntk=False, use_logn_attn=False)
    row = tokens(1, 20, 96)
    assert torch.equal(scaled.train()(row).logits, plain.train()(row).logits)
    assert not torch.allclose(scaled.eval()(row).logits, plain.eval()(row).logits)


def test_a_cache_keeps_the_scaling_that_its_keys_have():
    """An answer that grows over the trained length: keys in the cache cannot be rotated again."""
    model, row = build(), tokens(1, TRAINED + 4, 96)
    begin = model(row[:, :6], use_cache=True)
    cache = begin.past_key_values
    parts = [begin.logits]
    for place in range(6, row.shape[1]):
        parts.append(model(row[:, place : place + 1], past_key_values=cache).logits)
    unscaled = build(use_dynamic_ntk=False)  # queries are scaled by position in both
    torch.testing.assert_close(torch.cat(parts, 1), unscaled(row).logits, rtol=1e-5, atol=1e-5)


def test_padding_does_not_count():
    model, row = build(), tokens(1, 12, 96)
    rows = torch.cat((torch.nn.functional.pad(row, (8, 0)), tokens(1, 20, 96)))
    mask = torch.ones_like(rows)
    mask[0, :8] = 0
    found = model(rows, attention_mask=mask).logits[0, 8:]
    torch.testing.assert_close(found, model(row).logits[0], rtol=1e-5, atol=1e-5)


def test_embeddings_are_dropped_in_training():
    model, row = build(emb_dropout_prob=1.0), tokens(1, 5, 96)
    assert not model.train().transformer.embed(row).any()
    assert model.eval().transformer.embed(row).all()


def test_rotary_embeddings_on_a_part_are_refused():
    with pytest.raises(UserError, match="rotary_pct"):
        AutoConfig.for_model("qwen", **TINY, rotary_pct=0.5)


def test_the_flags_of_number_formats_are_kept(tmp_path):
    build(bf16=True).config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).bf16 is True
