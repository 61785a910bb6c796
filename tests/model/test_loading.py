"""From a config's llm to a model: attention, dtypes, context length, tokens, checkpoints."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.helpers.tiny import make_model, make_tokenizer, save_tiny
from xtuner.model import loading
from xtuner.utils.errors import UserError


def config_of(path, **settings):
    return dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=str(path),
        **settings,
    )


def test_models_of_a_config_compute_attention_by_our_function(tiny_llama):
    assert (
        loading.build_llm(config_of(tiny_llama), full=True).config._attn_implementation == "xtuner"
    )
    eager = loading.build_llm(config_of(tiny_llama, attn_implementation="eager"), full=True)
    assert eager.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "full, settings, expected",
    [
        (True, {}, torch.float32),
        (True, {"dtype": torch.bfloat16}, torch.bfloat16),
        (False, {"dtype": torch.bfloat16}, torch.bfloat16),
    ],
)
def test_all_weights_are_trained_in_float32_unless_the_config_says_otherwise(
    tiny_llama, full, settings, expected
):
    llm = loading.build_llm(config_of(tiny_llama, **settings), full=full)
    assert {weight.dtype for weight in llm.parameters()} == {expected}


def test_a_built_model_is_taken_as_it_is():
    llm = make_model()
    assert loading.build_llm(llm, full=True) is llm


def test_a_shorter_context_changes_nothing(tiny_llama):
    llm = loading.build_llm(config_of(tiny_llama), full=True, max_position_embeddings=16)
    assert llm.config.rope_parameters["rope_type"] == "default"


def test_embeddings_grow_only_for_tokens_that_the_model_lacks():
    tokenizer, llm = make_tokenizer(vocab_size=512), make_model()
    assert not loading.resize_token_embeddings(llm, tokenizer)
    before = llm.get_input_embeddings().weight.detach().clone()
    tokenizer.add_tokens([f"<new_{i}>" for i in range(len(before) + 1 - len(tokenizer))])
    assert loading.resize_token_embeddings(llm, tokenizer)
    after = llm.get_input_embeddings().weight
    assert after.shape[0] % loading.VOCABULARY_MULTIPLE == 0
    assert torch.equal(after[: len(before)], before)
    torch.testing.assert_close(after[len(before)], before.mean(0))


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    llm = make_model()
    with pytest.raises(UserError, match="no such checkpoint"):
        loading.init_from_checkpoint(llm, str(tmp_path / "iter_1.pth"))
    (tmp_path / "iter_1.pth").touch()
    name = "lm_head.weight"
    weights = {name: torch.zeros(3, 3)}
    monkeypatch.setattr(loading.READERS, "get", lambda kind: lambda path: weights)
    with pytest.raises(UserError, match=name):
        loading.init_from_checkpoint(llm, str(tmp_path / "iter_1.pth"))
    weights[name] = torch.ones_like(llm.lm_head.weight)
    loading.init_from_checkpoint(llm, str(tmp_path / "iter_1.pth"))
    assert torch.equal(llm.lm_head.weight, weights[name])


@pytest.mark.parametrize("method", ["mxfp4", "gptq", "awq", "fp8"])
def test_folders_with_quantized_weights_are_refused(method, tmp_path):
    folder = save_tiny(tmp_path)
    file = folder / "config.json"
    settings = json.loads(file.read_text("utf-8"))
    settings["quantization_config"] = {"quant_method": method, "bits": 4}
    file.write_text(json.dumps(settings), "utf-8")
    for full in (True, False):
        with pytest.raises(UserError, match=rf"are quantized \({method}\)") as refused:
            loading.build_llm(config_of(folder), full=full)
        assert "BF16" in refused.value.hint
    again = config_of(folder, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(UserError, match=method):
        loading.build_llm(again, full=False)


@pytest.mark.parametrize("harm", ["missing", "mismatched"])
def test_weights_that_are_not_whole_are_refused(tmp_path, harm):
    """transformers would draw them at random, and train on."""
    save_tiny(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if harm == "missing":
        del weights[name]
    else:
        weights[name] = weights[name][:3].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"1 weights are not whole: {name}"):
        loading.build_llm(config_of(tmp_path), full=True)
