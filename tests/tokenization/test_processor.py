"""Processors of the ten families: loaded without torchvision, and saved with nothing lost."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from transformers import processing_utils
from transformers.utils import is_torchvision_available

from tests.helpers.image_text import FAMILIES, image_text_folder, make_image
from tests.helpers.tiny import make_tokenizer
from xtuner.tokenization.processor import load_processor
from xtuner.utils.errors import UserError

IMAGES = [[make_image(56, 28, 1)], [make_image(28, 28, 2), make_image(28, 56, 3)]]


def inputs(processor):
    """What a processor makes of one row with an image and one with two."""
    part = {"type": "image"}
    rows = [[part, {"type": "text", "text": "What?"}], [part, {"type": "text", "text": "?"}, part]]
    texts = [
        processor.apply_chat_template([{"role": "user", "content": row}], tokenize=False)
        for row in rows
    ]
    return processor(images=IMAGES, text=texts, padding=True, return_tensors="pt")


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_saved_processor_gives_the_same(kind, tmp_path):
    processor = load_processor(image_text_folder(kind))
    processor.save_pretrained(tmp_path)
    wanted, found = inputs(processor), inputs(load_processor(tmp_path))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize("kind", [kind for kind, family in FAMILIES.items() if family.video])
def test_settings_of_the_video_processor_are_saved(kind, tmp_path):
    folder = image_text_folder(kind)
    load_processor(folder).save_pretrained(tmp_path)
    file = folder / "video_preprocessor_config.json"
    if file.is_file():
        wanted = json.loads(file.read_text("utf-8"))
    else:
        whole = json.loads((folder / "processor_config.json").read_text("utf-8"))
        wanted = whole["video_processor"]
    saved = json.loads((tmp_path / "processor_config.json").read_text("utf-8"))["video_processor"]
    assert saved["video_processor_type"] == wanted["video_processor_type"]
    if not is_torchvision_available():
        assert saved == wanted


def test_a_new_process_whose_modules_of_transformers_differ(monkeypatch):
    """The first import of transformers makes two modules of it, and processors look into one."""

    class Other(ModuleType):
        def __getattr__(self, name):
            return getattr(transformers, name)

    monkeypatch.setattr(processing_utils, "transformers_module", Other("transformers"))
    load_processor(image_text_folder("qwen2_5_vl"))


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_videos_say_what_to_install():
    processor = load_processor(image_text_folder("qwen2_5_vl"))
    assert processor.video_processor.merge_size == 2  # of its JSON
    assert not hasattr(processor.video_processor, "no_such_setting")
    with pytest.raises(UserError, match="torchvision"):
        processor.video_processor([[make_image(28, 28, 1)]])


def test_settings_reach_the_image_processor_alone(tmp_path):
    processor = load_processor(image_text_folder("qwen2_5_vl"), max_pixels=28 * 28)
    assert len(inputs(processor)["pixel_values"]) == 3 * 4  # one token of 2 x 2 patches each
    processor.save_pretrained(tmp_path)
    assert "max_pixels" not in (tmp_path / "tokenizer_config.json").read_text("utf-8")
    assert torch.equal(
        inputs(load_processor(tmp_path))["image_grid_thw"], inputs(processor)["image_grid_thw"]
    )
    with pytest.raises(UserError, match="no setting 'max_pixel'"):
        load_processor(image_text_folder("qwen2_5_vl"), max_pixel=28 * 28)


def test_a_text_model_has_no_processor(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no processor for images"):
        load_processor(tmp_path)


def test_an_empty_folder_is_one_sentence(tmp_path):
    with pytest.raises(UserError) as error:
        load_processor(tmp_path)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(UserError, match="does not exist"):
        load_processor(tmp_path / "missing")


def test_code_of_the_folder_does_not_run(tmp_path: Path):
    settings = {"auto_map": {"AutoProcessor": "processing.P"}, "processor_class": "P"}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings), "utf-8")
    (tmp_path / "processing.py").write_text("raise SystemExit('it ran')", "utf-8")
    with pytest.raises(UserError, match="trust"):
        load_processor(tmp_path)
