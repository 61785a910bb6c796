"""LLaVA models in a chat: assembled from parts, with the image before the first question."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests.helpers.tiny import make_model
from tests.helpers.vision_language import PATCHES, SIZE, make_clip, save_clip
from xtuner.chat.prompt import Turn
from xtuner.chat.vision_language import ImagePrompt, build_vision_language_model
from xtuner.model import LLaVAModel
from xtuner.utils.constants import IMAGE_TOKEN_INDEX
from xtuner.utils.errors import UserError
from xtuner.utils.templates import PROMPT_TEMPLATE


@pytest.fixture
def parts(tmp_path):
    """A projector's folder, and that of the visual encoder."""
    torch.manual_seed(0)
    model = LLaVAModel(
        llm=make_model(), visual_encoder=make_clip(), freeze_llm=True, freeze_visual_encoder=True
    )
    model.to_hf(tmp_path / "parts")
    return tmp_path / "parts", save_clip(tmp_path / "clip")


def test_it_generates_with_the_image_and_without(parts):
    folder, clip = parts
    model = build_vision_language_model(make_model(), folder, str(clip), -2)
    model.set_image(Image.new("RGB", (40, 24), "red"))
    assert model.pixels.shape == (1, 3, SIZE, SIZE)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 40, 41]])
    answer = model.generate(ids, **settings)
    assert answer.shape == (1, 4 + 3) and torch.equal(answer[:, :4], ids)
    text = torch.tensor([[1, 40, 41]])
    assert model.generate(text, **settings).shape == (1, 3 + 3)


def test_another_image_gives_other_logits(parts):
    folder, clip = parts
    torch.manual_seed(1)
    model = build_vision_language_model(make_model(), folder, str(clip), -2)
    pixels = []
    for color in ("red", "blue"):
        model.set_image(Image.new("RGB", (40, 24), color))
        pixels.append(model.pixels)
    assert not torch.equal(*pixels)
    assert PATCHES == 16  # features of an image, as many as the projector's rows


def test_a_part_that_is_missing_is_named(parts, tmp_path):
    folder, clip = parts
    with pytest.raises(UserError, match="no visual encoder"):
        build_vision_language_model(make_model(), folder, None, -2)
    with pytest.raises(UserError, match="the visual encoder cannot be loaded"):
        build_vision_language_model(make_model(), folder, str(tmp_path / "none"), -2)
    (clip / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="no image processor"):
        build_vision_language_model(make_model(), folder, str(clip), -2)


def test_the_image_comes_before_the_first_question_alone(tokenizer):
    prompt = ImagePrompt(tokenizer, PROMPT_TEMPLATE.vicuna)
    ids = prompt.ids([Turn("What is it?", "A cat."), Turn("Sure?")])
    assert ids.count(IMAGE_TOKEN_INDEX) == 1
    before = tokenizer.decode(ids[: ids.index(IMAGE_TOKEN_INDEX)])
    after = tokenizer.decode(ids[ids.index(IMAGE_TOKEN_INDEX) + 1 :])
    assert before.endswith("USER: ") and after.startswith("\nWhat is it?")


def test_an_image_needs_a_template(tokenizer):
    with pytest.raises(UserError, match="needs a template"):
        ImagePrompt(tokenizer).ids([Turn("What is it?")])
