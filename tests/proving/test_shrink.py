"""Small models of a class: what decides how it computes stays, each kind of layer is there."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig
from transformers import AutoModelForCausalLM as Plain

from tests.helpers.tiny import make_tokenizer
from xtuner.model.transformers_models.auto import AutoModelForCausalLM
from xtuner.proving.shrink import Owner, layer_kinds, shrink_config, write_shrunk
from xtuner.utils.errors import UserError

WIDE = {"vocab_size": 600, "num_hidden_layers": 12, "pad_token_id": 0}
KINDS: dict[str, tuple[dict[str, object], int, int]] = {
    "qwen2": ({}, 2, 1),
    "gemma3_text": ({}, 2, 2),
    "glm4_moe": ({"first_k_dense_replace": 3}, 2, 2),
    "deepseek_v3": ({}, 2, 2),
    "qwen3_next": ({}, 2, 2),
    "lfm2": ({"full_attn_idxs": [2, 5, 8]}, 2, 2),
    "jamba": ({}, 5, 3),
    "falcon_h1": ({}, 2, 1),
    "phi3": ({}, 2, 1),
    "gpt2": ({}, 2, 1),
}
"""Changed settings of a class, how many layers its small model has, and of how many kinds."""


def owner(path: str = "") -> Owner:
    return Owner(AutoModelForCausalLM, path, trusted=False)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_layer_is_kept(kind):
    settings, layers, kinds = KINDS[kind]
    config = AutoConfig.for_model(kind, **{**WIDE, **settings})
    small, found = shrink_config(owner(), config)
    assert (small.num_hidden_layers, found) == (layers, kinds)
    assert small.vocab_size == 600 and small.hidden_size == 64
    with torch.device("meta"):
        model = Plain.from_config(small)
    assert len(set(layer_kinds(model, layers))) == kinds
    assert model.num_parameters() < 2_000_000


@pytest.mark.parametrize(("heads", "kv", "expected"), [(32, 8, 2), (32, 32, 4), (32, 1, 1)])
def test_grouped_heads_stay_grouped(heads, kv, expected):
    given = {"num_attention_heads": heads, "num_key_value_heads": kv, "hidden_size": 4096}
    small, _ = shrink_config(owner(), AutoConfig.for_model("qwen2", **WIDE, **given))
    assert (small.num_attention_heads, small.num_key_value_heads) == (4, expected)


def test_experts_stay_more_than_are_chosen():
    config = AutoConfig.for_model("qwen3_moe", **WIDE, num_experts=128, num_experts_per_tok=8)
    small, _ = shrink_config(owner(), config)
    assert (small.num_experts, small.num_experts_per_tok) == (4, 2)


def test_rotary_lists_fit_the_small_heads():
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 4096,
        "long_factor": [1.5] * 48,
        "short_factor": [1.1] * 48,
    }
    given = {**WIDE, "rope_parameters": longrope, "max_position_embeddings": 131072}
    small, _ = shrink_config(owner(), AutoConfig.for_model("phi3", **given))
    assert len(small.rope_parameters["long_factor"]) == 8
    model = Plain.from_config(small)
    assert model(input_ids=torch.arange(9)[None]).logits.isfinite().all()


def test_the_folder_is_whole_and_the_same_each_time(tmp_path):
    base = tmp_path / "base"
    config = AutoConfig.for_model("qwen2", **WIDE, tie_word_embeddings=True)
    config.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    (base / "model.safetensors.index.json").write_text("{}", "utf-8")
    made = write_shrunk(owner(str(base)), tmp_path / "a")
    write_shrunk(owner(str(base)), tmp_path / "b")
    assert str(made) == "Qwen2ForCausalLM: 2 of 12 layers (1 kinds), width 64 of 4096"
    one, other = (Plain.from_pretrained(tmp_path / name) for name in ("a", "b"))
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    assert one.get_output_embeddings().weight is one.get_input_embeddings().weight
    assert (tmp_path / "a" / "tokenizer.json").is_file()
    assert not (tmp_path / "a" / "model.safetensors.index.json").exists()
    assert not list(base.glob("*.safetensors"))


def test_noise_is_left_out_where_asked(tmp_path):
    config = AutoConfig.for_model("gpt2", n_layer=12, vocab_size=600, resid_pdrop=0.1)
    config.save_pretrained(tmp_path / "base")
    for name, noise in (("with", True), ("without", False)):
        write_shrunk(owner(str(tmp_path / "base")), tmp_path / name, noise=noise)
        found = json.loads((tmp_path / name / "config.json").read_text("utf-8"))
        assert found["resid_pdrop"] == (0.1 if noise else 0.0)


def test_small_models_stay_as_they_are():
    config = AutoConfig.for_model("llama", **{**WIDE, "hidden_size": 32, "intermediate_size": 64})
    assert shrink_config(owner(), config)[0] is config


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no config\.json"):
        write_shrunk(owner(str(tmp_path)), tmp_path / "out")
