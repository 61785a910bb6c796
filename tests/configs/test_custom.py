"""Epochs, accumulation and packing that fit the number of a user's rows, with images or without."""

from __future__ import annotations

import pytest

from xtuner.configs.custom import ENOUGH_STEPS, Rows, own_card, own_dataset, render_own


@pytest.mark.parametrize("count", [1, 10, 60, 1000, 50_000])
def test_epochs_and_accumulation_fit_the_number_of_rows(count):
    settings = own_dataset(Rows(("x",), count, count * 90, None), 2048).settings
    packed = settings["pack_to_max_length"]
    assert packed == (count == 50_000)
    batches = 50_000 * 30 // 2048 if packed else count
    per_step = settings["batch_size"] * settings["accumulative_counts"]
    steps = settings["max_epochs"] * max(1, batches // per_step)
    assert 3 <= settings["max_epochs"] <= 10 and 1 <= per_step <= 16
    assert steps >= ENOUGH_STEPS / 2 or settings["max_epochs"] == 10


@pytest.mark.parametrize(
    ("count", "characters", "expected"),
    [
        (60, 90, (3, 1)),  # a few short rows: all of a step at once
        (1000, 90, (4, 4)),
        (60, 9000, (1, 3)),  # long ones: one by one
        (50_000, 90, (1, 16)),  # packed
    ],
)
def test_short_rows_are_computed_together(count, characters, expected):
    settings = own_dataset(Rows(("x",), count, count * characters, None), 2048).settings
    assert (settings["batch_size"], settings["accumulative_counts"]) == expected


def test_rows_with_images_are_rendered_for_a_model_that_takes_them():
    card = own_card("/models/vlm", "vlm", {}, chat_template=True, kind="vision")
    images = ("/photos/1.png",)
    rows = Rows(("/photos/a.jsonl",), 60, 60_000, None, None, ("What?",), "/photos", images)
    text = render_own(card, "lora", rows, "vlm_lora_a")
    for part in (
        "type=VisionLanguageFinetune",
        "AutoModelForImageTextToText.from_pretrained",
        'image_folder = "/photos"',
        'data_files = ["/photos/a.jsonl"]',
        'evaluation_images = ["/photos/1.png"]',
        "max_length = 4096",
        "lr = 1e-4",
    ):
        assert part in text, part
    assert "60 rows of your own" in text and "/path/to" not in text
