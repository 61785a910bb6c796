"""Boxes of RefCOCO: hundredths of the image or of its square, and rows that are no boxes."""

import json

import pytest

from xtuner.dataset import json_file
from xtuner.dataset.refcoco_json import (
    InvRefCOCOJsonDataset,
    RefCOCOJsonDataset,
    RefCOCOJsonEvalDataset,
    read_boxes,
    scaled_box,
)
from xtuner.utils.errors import UserError

ROW = {"id": 7, "image": "a.png", "width": 200, "height": 100, "bbox": [50, 25, 150, 75]}
ROW |= {"sents": ["the left cat", "a cat"]}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps([ROW]))
    return str(path)


def conversations(kind, file, square=False):
    """The rows of a dataset without its images and tokens."""
    dataset = object.__new__(kind)
    dataset.pad_image_to_square = square
    return dataset.read_rows(file)


def test_boxes_are_hundredths_of_the_image():
    assert scaled_box(ROW, square=False) == [25, 25, 75, 75]


def test_boxes_are_hundredths_of_the_square_that_the_image_is_padded_to():
    # 200 x 100 becomes 200 x 200: 50 pixels are added above.
    assert scaled_box(ROW, square=True) == [25, 38, 75, 62]
    upright = ROW | {"width": 100, "height": 200, "bbox": [0, 0, 100, 200]}
    assert scaled_box(upright, square=True) == [25, 0, 75, 100]


def test_corners_outside_the_image_are_put_on_its_edge():
    assert scaled_box(ROW | {"bbox": [-20, 0, 260, 130]}, square=False) == [0, 0, 100, 100]


def test_a_row_is_one_question_for_each_of_its_texts(file):
    rows = conversations(RefCOCOJsonDataset, file)
    assert [row["image"] for row in rows] == ["a.png", "a.png"]
    question, answer = rows[1]["conversations"]
    assert question == {
        "from": "human",
        "value": "<image>\n[refer] give me the location of a cat",
    }
    assert answer == {"from": "gpt", "value": "{<25><25><75><75>}"}


def test_the_inverse_asks_for_the_text(file):
    question, answer = conversations(InvRefCOCOJsonDataset, file, square=True)[0]["conversations"]
    assert question["value"] == "<image>\n[identify] what is this {<25><38><75><62>}"
    assert answer["value"] == "the left cat"


def test_questions_of_an_evaluation(file):
    dataset = RefCOCOJsonEvalDataset(file, pad_image_to_square=False)
    assert len(dataset) == 2
    assert dataset[0] == {
        "id": 7,
        "image": "a.png",
        "text": "the left cat",
        "question": "[refer] give me the location of the left cat",
        "box": [25, 25, 75, 75],
    }


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"bbox": [50, 25, 50, 75]}, "empty bbox"),
        ({"bbox": [1, 2, 3]}, "bbox [1, 2, 3]"),
        ({"bbox": [0, 0, float("nan"), 1]}, "bbox"),
        ({"width": 0}, "width and height [0, 100]"),
        ({"sents": "a cat"}, "sents 'a cat'"),
        ({"image": None}, "image None"),
    ],
)
def test_rows_that_are_no_boxes_are_named(tmp_path, change, why):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps([ROW, ROW | change, {"image": "b.png"}]))
    with pytest.raises(UserError) as refused:
        read_boxes(str(path))
    assert "2 rows are no boxes" in str(refused.value)
    assert f"1: {why}" in str(refused.value)
    assert "2: no width, height, bbox, sents" in str(refused.value)
    rows = conversations(RefCOCOJsonDataset, str(path))
    assert [isinstance(row, json_file.BrokenRow) for row in rows] == [False, False, True, True]
