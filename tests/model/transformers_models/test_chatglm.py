"""ChatGLM: its rounded buffer, its settings, its place among the Auto classes."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.helpers.golden_model import fill, tokens
from xtuner.model.transformers_models.auto import AutoConfig, AutoModelForCausalLM
from xtuner.utils.errors import UserError

TINY = {
    "padded_vocab_size": 96,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "kv_channels": 8,
    "num_layers": 2,
    "num_attention_heads": 4,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
    "seq_length": 64,
}


def build(**settings):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("chatglm", **TINY, **settings))
    fill(model)
    return model.eval()


def test_names_of_tensors_are_the_hubs():
    names = set(build().state_dict())
    assert {name for name in names if ".0." in name} == {
        f"transformer.encoder.layers.0.{name}"
        for name in (
            "input_layernorm.weight",
            "self_attention.query_key_value.weight",
            "self_attention.query_key_value.bias",
            "self_attention.dense.weight",
            "post_attention_layernorm.weight",
            "mlp.dense_h_to_4h.weight",
            "mlp.dense_4h_to_h.weight",
        )
    }
    assert {name for name in names if ".layers." not in name} == {
        "transformer.embedding.word_embeddings.weight",
        "transformer.rotary_pos_emb.inv_freq",
        "transformer.encoder.final_layernorm.weight",
        "transformer.output_layer.weight",
    }


@pytest.mark.parametrize("change", ["rounded", "missing", "wrong"])
def test_positions_do_not_depend_on_the_checkpoints_buffer(tmp_path, change):
    model, row = build(), tokens(1, 20, 96)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    buffer = weights.pop("transformer.rotary_pos_emb.inv_freq")
    if change != "missing":
        kept = buffer.half() if change == "rounded" else torch.full_like(buffer, 7.0)
        weights["transformer.rotary_pos_emb.inv_freq"] = kept
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(row).logits, model(row).logits)
    if change == "missing":  # made again, for the code that reads what we save
        torch.testing.assert_close(again.transformer.rotary_pos_emb.inv_freq, buffer)


def test_the_ratio_of_long_models_multiplies_the_base():
    frequencies = build(rope_ratio=50).transformer.rotary_pos_emb.frequencies(torch.device("cpu"))
    torch.testing.assert_close(frequencies, torch.tensor([1.0, (50 * 10000) ** -0.5]))


def test_half_of_each_head_is_rotated():
    positions = torch.arange(5)[None]
    cos, _ = build().transformer.rotary_pos_emb(torch.zeros(1), positions)
    assert cos.shape == (1, 5, TINY["kv_channels"] // 2)


def test_every_auto_class_gives_the_model_with_its_output_layer(tmp_path):
    build().save_pretrained(tmp_path)
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        model = getattr(transformers, name).from_pretrained(tmp_path)
        assert type(model).__name__ == "ChatGLMForConditionalGeneration"


def test_what_is_saved_names_the_body_as_the_hub_does(tmp_path):
    build().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architectures"] == ["ChatGLMModel"]
    assert fields["original_rope"] is True  # the hub's code has no default for it


def test_a_grown_vocabulary_goes_through_a_folder(tmp_path):
    model, row = build(), tokens(1, 9, 96)
    before = model(row).logits
    model.resize_token_embeddings(128, mean_resizing=False)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["padded_vocab_size"] == 128
    after = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(row).logits
    assert after.shape[-1] == 128
    torch.testing.assert_close(after[..., :96], before)


@pytest.mark.parametrize(
    "setting", [{"quantization_bit": 4}, {"pre_seq_len": 128}, {"fp32_residual_connection": True}]
)
def test_what_is_not_computed_is_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        AutoConfig.for_model("chatglm", **TINY, **setting)
