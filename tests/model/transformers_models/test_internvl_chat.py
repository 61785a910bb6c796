"""InternVL: image features as the hub's code makes them, and each language model inside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.golden_model import fill, tokens
from tests.helpers.tiny_internvl import LANGUAGE_MODELS, internvl_config, save_internvl
from xtuner.model.modules import attention
from xtuner.model.transformers_models.auto import AutoConfig, AutoModel
from xtuner.model.transformers_models.intern_vit.modeling_intern_vit import DropPath

FIGURES = json.loads(
    (Path(__file__).parents[2] / "golden/families/vision/internvl_chat.json").read_text("utf-8")
)
LANGUAGE = {
    "model_type": "internlm2",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "bias": False,
}


def pixels(tiles: int, side: int) -> torch.Tensor:
    number = torch.arange(tiles * 3 * side * side, dtype=torch.float64)
    wave = torch.sin(number * 0.0123 + 0.1 * torch.cos(number * 0.7))
    return wave.float().view(tiles, 3, side, side)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", attention.register()])
@pytest.mark.parametrize(("figures", "side"), [("plain", 32), ("large", 48)])
@pytest.mark.parametrize("case", FIGURES.values(), ids=FIGURES)
def test_image_features_and_gradients(case, figures, side, implementation):
    config = AutoConfig.for_model(
        "internvl_chat", vision_config=dict(case["vision"]), llm_config=LANGUAGE, **case["whole"]
    )
    model = AutoModel.from_config(config, attn_implementation=implementation).eval()
    fill(model)
    features = model.extract_feature(pixels(2, side))
    steps = torch.arange(features.numel()).float()
    (features * torch.cos(steps * 0.37).view_as(features)).sum().backward()
    wanted = case[figures]
    found = features.detach().flatten()[:: max(1, features.numel() // 12)].tolist()
    assert found == pytest.approx(wanted["features"], abs=1e-5)
    weights = dict(model.named_parameters())
    for name, norm in wanted["gradients"].items():
        assert float(weights[name].grad.norm()) == pytest.approx(norm, rel=1e-5, abs=1e-5), name


@pytest.fixture(scope="module", params=LANGUAGE_MODELS)
def folder(request, tmp_path_factory):
    return save_internvl(tmp_path_factory.mktemp("internvl") / request.param, request.param)


def rows_with_images(model):
    """Two rows: one with a tile's four places, one without."""
    model.img_context_token_id = 7
    ids = 8 + tokens(2, 12, model.config.llm_config.vocab_size - 8)
    ids[0, 2:6] = 7
    return ids


def test_a_folder_of_the_hub_loads(folder):
    model, found = AutoModel.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    assert all(weight.isfinite().all() for weight in model.state_dict().values())
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    assert model.dtype == model.language_model.dtype == torch.float32


def test_the_loss_is_that_of_the_language_model_on_the_features(folder):
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = rows_with_images(model)
    tiles = pixels(2, 32)
    flags = torch.tensor([[1], [0]])  # the second only fills the batch
    loss = model(tiles, ids, image_flags=flags, labels=ids).loss
    embedded = model.language_model.get_input_embeddings()(ids).clone()
    embedded[0, 2:6] = model.extract_feature(tiles[:1])[0]
    logits = model.language_model(inputs_embeds=embedded).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert float(model.mlp1[1].weight.grad.norm()) > 0
    with pytest.raises(ValueError, match="4 places for 8 image features"):
        model(tiles, ids)


def test_generation_sees_the_image(folder):
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = rows_with_images(model)[:1]
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    answer = model.generate(pixels(1, 32), ids, **settings)
    assert answer.shape == (1, 3)
    logits = model(pixels(1, 32), ids).logits
    assert int(answer[0, 0]) == int(logits[0, -1].argmax())
    features = model.extract_feature(pixels(1, 32))
    assert torch.equal(answer, model.generate(None, ids, visual_features=features, **settings))


def test_what_is_saved_keeps_the_fields_of_the_hub(folder, tmp_path):
    before = json.loads((folder / "config.json").read_text("utf-8"))
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    after = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert {key: after[key] for key in before if not key.endswith("_config")} == {
        key: value for key, value in before.items() if not key.endswith("_config")
    }
    assert after["vision_config"].items() >= before["vision_config"].items()
    kept = before["llm_config"].keys() - {"attn_implementation"}
    assert {key: after["llm_config"][key] for key in kept} == {
        key: before["llm_config"][key] for key in kept
    }


def test_unmerged_adapters_are_refused():
    with pytest.raises(ValueError, match="merge the adapters"):
        AutoConfig.for_model(**internvl_config() | {"use_llm_lora": 16})


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean():
    layer, ones = DropPath(0.25), torch.ones(4000, 3, 2)
    assert torch.equal(layer.eval()(ones), ones)
    torch.manual_seed(0)
    kept = layer.train()(ones)
    assert {round(float(value), 4) for value in kept.unique()} == {0.0, round(4 / 3, 4)}
    assert torch.equal(kept.amax((1, 2)), kept.amin((1, 2)))
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.03)
