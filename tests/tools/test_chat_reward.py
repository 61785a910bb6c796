"""``xtuner chat`` with a reward model that sees: the reward is that of the training."""

from __future__ import annotations

import io
import re
import sys

import pytest
import torch
from datasets import Dataset

from tests.helpers.image_text import image_text_folder, make_image, plain_image_text
from xtuner.dataset import VisionLanguagePreferenceDataset
from xtuner.dataset.collate_fns import vision_language_collate_fn
from xtuner.entry_point import main
from xtuner.export.sidecar_files import write_reward_token
from xtuner.model import VisionLanguageRewardModel
from xtuner.tokenization.processor import load_processor

QUESTION, ANSWER = "What is it?", "a square"


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_a_reward_about_images_is_that_of_the_training(kind, tmp_path, monkeypatch, capsys):
    processor = load_processor(str(image_text_folder(kind)))
    token = processor.tokenizer.eos_token_id
    model = VisionLanguageRewardModel(plain_image_text(kind), processor=processor).eval()
    with torch.no_grad():
        model.v_head.weight.mul_(50)
    model.to_hf(tmp_path / "hf")
    write_reward_token(tmp_path / "hf", token)
    images = [make_image(56, 28, 1), make_image(28, 28, 2)]
    files = [str(tmp_path / f"{number}.png") for number in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    row = {"question": QUESTION, "chosen": ANSWER, "rejected": "no", "images": files}
    data = VisionLanguagePreferenceDataset(
        Dataset.from_list([row]), processor, 128, is_reward=True, reward_token_id=token
    )
    batch = vision_language_collate_fn([data[0]], processor)["data"]
    with torch.no_grad():
        wanted = float(model(batch, mode="tensor")[batch["labels"] == 0])
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n{ANSWER}\nexit\n"))
    words = [word for file in files for word in ("--image", file)]
    assert main(["chat", str(tmp_path / "hf"), *words]) == 0
    (shown,) = re.findall(r"reward: (\S+)", capsys.readouterr().out)
    assert abs(wanted) > 0.05
    assert float(shown) == pytest.approx(wanted, abs=6e-4)
    assert main(["chat", str(tmp_path / "hf"), "--video", files[0]]) == 1
    assert "shown images alone" in capsys.readouterr().err
