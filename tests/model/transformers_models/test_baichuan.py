"""Baichuan: which of its four architectures, ALiBi as columns, the normalised output layer."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import linear, normalize

from tests.helpers.golden_model import fill, tokens
from xtuner.model import SupervisedFinetune
from xtuner.model.modules import attention
from xtuner.model.transformers_models.auto import AutoConfig, AutoModelForCausalLM
from xtuner.model.transformers_models.baichuan import alibi
from xtuner.model.transformers_models.baichuan.modeling_baichuan import NormHead
from xtuner.model.transformers_models.decoder import attend
from xtuner.utils.errors import UserError

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
ROTARY, ALIBI = {"max_position_embeddings": 64}, {"model_max_length": 64}


def build(implementation="sdpa", **settings):
    config = AutoConfig.for_model("baichuan", **{**TINY, **settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    fill(model)
    return model.eval()


def test_positions_are_told_by_the_fields_that_the_hub_has():
    assert not AutoConfig.for_model("baichuan", **TINY, **ROTARY).uses_alibi
    assert AutoConfig.for_model("baichuan", **TINY, **ALIBI).uses_alibi


@pytest.mark.parametrize(
    ("vocabulary", "chosen", "normalized"),
    [(64000, None, False), (125696, None, True), (125760, None, True), (96, True, True)],
)
def test_the_output_layer_is_told_by_the_vocabulary(vocabulary, chosen, normalized):
    config = AutoConfig.for_model("baichuan", vocab_size=vocabulary, norm_head=chosen)
    assert config.normalizes_head is normalized


@pytest.mark.parametrize("kind", [ROTARY, ALIBI])
def test_what_is_saved_says_which_architecture_it_is(tmp_path, kind):
    build(**kind).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.get("max_position_embeddings") == kind.get("max_position_embeddings")
    assert fields.get("model_max_length") == kind.get("model_max_length")
    assert "norm_head" not in fields
    assert AutoConfig.from_pretrained(tmp_path).uses_alibi is (kind is ALIBI)


@pytest.mark.parametrize("name", ["BaichuanForCausalLM", "BaiChuanForCausalLM"])
def test_the_name_of_the_class_is_the_folders(tmp_path, name):
    config = AutoConfig.for_model("baichuan", **TINY, **ROTARY, architectures=[name])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [name]


@pytest.mark.parametrize("heads", [1, 4, 6, 32, 40])
def test_slopes_are_the_papers(heads):
    power = 2 ** (heads.bit_length() - 1)
    found = alibi.slopes(heads)
    assert len(found) == heads
    assert found[:power] == pytest.approx([2 ** (-8 * n / power) for n in range(1, power + 1)])
    assert found[power:] == pytest.approx(
        [2 ** (-4 * n / power) for n in range(1, 2 * (heads - power), 2)]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_columns_hold_slope_times_position_exactly(dtype):
    scaling, heads = 128**-0.5, 40
    positions = torch.tensor([[0, 1, 255, 256, 1000, 4095, 65535]])
    queries = alibi.query_columns(heads, scaling, torch.device("cpu")).to(dtype).double()
    keys = alibi.key_columns(positions).to(dtype)[0, 0].double()
    wanted = torch.tensor(alibi.slopes(heads)).double()[:, None] * positions.double()
    torch.testing.assert_close(queries @ keys.T * scaling, wanted, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", attention.register()])
def test_alibi_in_bfloat16_is_as_near_as_its_inputs(implementation):
    """Rounded to bfloat16, distances of a long row would be off by whole tokens."""
    length, width = 700, 8
    shape = (1, 4, length, width)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(shape, generator=generator).bfloat16() for _ in range(3))
    positions = torch.arange(length)[None]
    future = torch.full((length, length), -1e9).triu(1)
    bias = torch.tensor(alibi.slopes(4))[:, None, None] * positions + future
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), attn_mask=bias[None]
    )
    layer = build(implementation, **ALIBI).model.layers[0].self_attn
    wide = alibi.with_alibi(query, key, value, positions, layer.scaling)
    mask = future[None, None] if implementation == "eager" else None
    found, _ = attend(layer, *wide, mask, eager=alibi.eager_attention)
    found = found.unflatten(-1, (4, -1))[..., :width].transpose(1, 2).float()
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_the_normalized_layer_does_not_depend_on_the_length_of_its_rows():
    head = NormHead(8, 5, bias=False)
    x = torch.randn(3, 8)
    torch.testing.assert_close(head(x), linear(x, normalize(head.weight)))
    before = head(x)
    with torch.no_grad():
        head.weight.mul_(torch.arange(1.0, 6.0)[:, None])
    torch.testing.assert_close(head(x), before)


def test_the_loss_of_training_is_that_of_the_normalized_layer():
    model = build(**ALIBI, norm_head=True)
    ids = tokens(2, 12, 96)
    wanted = model(input_ids=ids, labels=ids).loss
    wanted.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    trained = SupervisedFinetune(llm=model, use_activation_checkpointing=False)
    data = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    loss = trained(data, mode="loss")["loss"]
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-4, atol=1e-5)


def test_a_grown_vocabulary_keeps_the_normalized_layer():
    model = build(**ROTARY, norm_head=True)
    row = tokens(1, 5, 96)
    before = model(row).logits
    model.resize_token_embeddings(128, mean_resizing=False)
    assert type(model.lm_head) is NormHead
    torch.testing.assert_close(model(row).logits[..., :96], before)


def test_the_z_loss_of_the_hubs_code_is_refused():
    with pytest.raises(UserError, match="z_loss_weight"):
        AutoConfig.for_model("baichuan", **TINY, z_loss_weight=1e-4)
