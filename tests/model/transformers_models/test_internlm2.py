"""InternLM2: its configuration, its fused layer, its reward model."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.golden_model import fill, tokens
from xtuner.model.transformers_models.auto import AutoConfig
from xtuner.model.transformers_models.internlm2.modeling_internlm2 import (
    InternLM2Attention,
    InternLM2ForCausalLM,
    InternLM2ForRewardModel,
)
from xtuner.model.transformers_models.rotary import RotaryEmbedding

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bias": False,
}


@pytest.mark.parametrize(
    "scaling", [None, {"type": "dynamic", "factor": 2.0}, {"type": "linear", "factor": 4.0}]
)
def test_rope_scaling_goes_through_a_folder(tmp_path, scaling):
    config = AutoConfig.for_model("internlm2", **TINY, rope_theta=1000000, rope_scaling=scaling)
    kind = "default" if scaling is None else scaling["type"]
    assert config.rope_parameters["rope_type"] == kind
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == config.rope_parameters
    assert again.to_dict()["rope_scaling"] == scaling
    assert again.to_dict()["rope_theta"] == 1000000


def test_names_of_tensors_are_the_hubs():
    model = InternLM2ForCausalLM(AutoConfig.for_model("internlm2", **TINY | {"bias": True}))
    inside = {name.removeprefix("model.layers.1.") for name in model.state_dict() if ".1." in name}
    assert inside == {
        "attention.wqkv.weight",
        "attention.wqkv.bias",
        "attention.wo.weight",
        "attention.wo.bias",
        "feed_forward.w1.weight",
        "feed_forward.w2.weight",
        "feed_forward.w3.weight",
        "attention_norm.weight",
        "ffn_norm.weight",
    }
    outside = {name for name in model.state_dict() if ".layers." not in name}
    assert outside == {"model.tok_embeddings.weight", "model.norm.weight", "output.weight"}


def test_buffers_are_none():
    """transformers 5 leaves buffers that are not saved as uninitialised memory."""
    model = InternLM2ForCausalLM(AutoConfig.for_model("internlm2", **TINY))
    assert not list(model.named_buffers())


def test_dynamic_scaling_does_not_remember_long_rows():
    scaling = {"type": "dynamic", "factor": 2.0}
    config = AutoConfig.for_model(
        "internlm2", **TINY, max_position_embeddings=16, rope_scaling=scaling
    )
    model = InternLM2ForCausalLM(config).eval()
    row = tokens(1, 20, 64)
    before = model(row).logits
    model(tokens(1, 40, 64))
    assert torch.equal(model(row).logits, before)


def test_dynamic_scaling_is_each_samples_own():
    """In a batch, as in a packed row, a sample is scaled by its own length."""
    scaling = {"type": "dynamic", "factor": 2.0}
    config = AutoConfig.for_model(
        "internlm2", **TINY, max_position_embeddings=16, rope_scaling=scaling
    )
    rotary = RotaryEmbedding(config)
    short, long = torch.arange(20), torch.arange(40)
    x, packed = torch.zeros(1), torch.cat((short, long))[None]
    pairs = zip(rotary(x, short[None]), rotary(x, long[None]), strict=True)
    alone = [torch.cat(pair, 1) for pair in pairs]
    for found, wanted in zip(rotary(x, packed), alone, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert float((alone[0][0, 5] - alone[0][0, 25]).abs().max()) > 1e-3  # position 5 of each


def test_heads_attend_by_groups():
    """Only the rows of one key head in ``wqkv`` move the output of its own query heads."""
    config = AutoConfig.for_model("internlm2", **TINY)
    config._attn_implementation = "eager"
    layer = InternLM2Attention(config, 0)
    fill(layer)
    layer.wo = torch.nn.Identity()
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    still = torch.ones(1, 5, 8), torch.zeros(1, 5, 8)
    before, _ = layer(x, still)
    with torch.no_grad():
        layer.wqkv.weight[32:] = 0.0  # the second key head: two queries, key and value of 8 rows
    after, _ = layer(x, still)
    assert torch.equal(before[..., :16], after[..., :16])
    assert not after[..., 16:].any()


def test_reward_is_read_at_the_last_reward_token():
    config = AutoConfig.for_model("internlm2", **TINY, reward_token_id=2)
    model = InternLM2ForRewardModel(config).eval()
    fill(model)
    rows = tokens(2, 10, 64)
    rows[0, 9] = rows[1, 5] = 2
    rows[1, 6:] = 0
    mask = torch.ones_like(rows)
    mask[1, 6:] = 0
    rewards = model(rows, attention_mask=mask).logits
    assert rewards.shape == (2, 1)
    torch.testing.assert_close(rewards[1:], model(rows[1:, :6]).logits)
    hidden = model.model(rows[:1]).last_hidden_state
    torch.testing.assert_close(rewards[:1], model.v_head(hidden[:, -1]))
    with pytest.raises(ValueError, match="reward token 2"):
        model(tokens(1, 4, 64))
