"""InternVL's rows: tiles as published, a place for each feature, rows of several files."""

import json

import pytest
import torch
from PIL import Image

from tests.helpers.tiny_internvl import save_internvl
from xtuner.dataset import InternVL_V1_5_Dataset
from xtuner.dataset.internvl import choose_grid, cut, to_pixels
from xtuner.utils import PROMPT_TEMPLATE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("internvl")
    save_internvl(folder / "base", "internlm2")
    (folder / "images").mkdir()
    rows = []
    for number, size in enumerate([(64, 32), (32, 32)]):
        Image.new("RGB", size, "blue").save(folder / "images" / f"{number}.png")
        talk = [{"from": "human", "value": "<image>\ncolor?"}, {"from": "gpt", "value": "blue"}]
        rows.append({"image": f"{number}.png", "conversations": talk})
    rows.append(
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def dataset(folder, **settings):
    return InternVL_V1_5_Dataset(
        model_path=str(folder / "base"),
        template=PROMPT_TEMPLATE.internlm2_chat,
        **{
            "data_paths": str(folder / "rows.jsonl"),
            "image_folders": str(folder / "images"),
            "max_length": 128,
            **settings,
        },
    )


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((448, 448), (1, 1)),
        ((900, 450), (2, 1)),
        ((450, 900), (1, 2)),
        ((1344, 448), (3, 1)),
        ((2000, 2000), (3, 3)),  # large enough for the largest square
        ((500, 500), (1, 1)),
    ],
)
def test_the_grid_has_the_shape_of_the_image(size, grid):
    assert choose_grid(*size, 1, 12, 448) == grid


def test_tiles_put_together_are_the_image():
    image = Image.effect_noise((64, 32), 60).convert("RGB")
    tiles = cut(image, (2, 1), 32, thumbnail=True)
    assert len(tiles) == 3
    whole = torch.cat([to_pixels(tiles[:1])[0], to_pixels(tiles[1:2])[0]], dim=2)
    torch.testing.assert_close(whole, to_pixels([image])[0])


def test_rows_have_a_place_for_each_feature(folder):
    made = dataset(folder)
    context = made.marks[1]
    wide, square, text = (made[n] for n in range(3))
    assert wide["pixel_values"].shape == (3, 3, 32, 32)  # two tiles and the whole
    assert wide["input_ids"].count(context) == 3 * 4
    assert square["input_ids"].count(context) == 4
    assert "pixel_values" not in text
    for row, length in zip((wide, square, text), made.length, strict=True):
        assert len(row["input_ids"]) == len(row["labels"]) == length
        assert all(label != context for label in row["labels"])
    assert made.modality_length == [made.length[0], made.length[1], -made.length[2]]
    assert len(dataset(folder, repeat_times=2)) == 6


def test_an_image_is_never_cut(folder):
    row = dataset(folder, max_length=32)[0]
    assert row["input_ids"].count(dataset(folder).marks[1]) == 12


def test_files_are_repeated_each_with_its_folder(folder):
    path, images = str(folder / "rows.jsonl"), str(folder / "images")
    once = dataset(folder)
    joined = dataset(
        folder, data_paths=[path, path], image_folders=[images, images], repeat_times=[2, 1]
    )
    assert (len(once), len(joined)) == (3, 9)
    assert joined.length == once.length * 3
    assert [n > 0 for n in joined.modality_length] == [True, True, False] * 3
