"""Rows about images: broken ones are named and left out, or refused; marks stand for images."""

import io
import json
import random

import pytest
from PIL import Image

from tests.helpers.tiny import make_tokenizer
from tests.helpers.vision_language import make_image_processor, save_square
from xtuner.dataset import LLaVADataset
from xtuner.dataset.images import load_image, problems_of
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
from xtuner.dataset.refcoco_json import RefCOCOJsonDataset
from xtuner.utils.errors import UserError
from xtuner.utils.templates import PROMPT_TEMPLATE

IMAGE = -200
ASK = {"from": "human", "value": "<image>\nWhat is it?"}
SAY = {"from": "gpt", "value": "a square"}
GOOD = {"image": "good.png", "conversations": [ASK, SAY]}

# What a row may look like that cannot be used, and what is said of it.
BROKEN = [
    ({**GOOD, "image": 5}, "its image is 5"),
    ({**GOOD, "image": [None]}, "its image is [None]"),
    ({**GOOD, "image": {"file": "good.png"}}, "its image is {"),
    ({**GOOD, "image": "a\0b.png"}, "null byte"),
    ({**GOOD, "image": "x" * 5000}, "name too long"),
    ({**GOOD, "image": "none.png"}, "No such file"),
    ({**GOOD, "image": "text.png"}, "is no image"),
    ({**GOOD, "image": "bomb.bmp"}, "exceeds limit"),
    ({**GOOD, "image": []}, "1 <image> in the text, 0 images"),
    ({"image": "good.png"}, "it has no 'conversations'"),
    ({**GOOD, "conversations": None}, "llava_map_fn cannot read it"),
    ({**GOOD, "conversations": []}, "its conversation is empty"),
    ({**GOOD, "conversations": "text"}, "llava_map_fn cannot read it"),
    ({**GOOD, "conversations": [ASK]}, "its conversation is empty"),
    ({**GOOD, "conversations": [{"value": "x"}, SAY]}, "it has no 'from'"),
    ({**GOOD, "conversations": [ASK, {"from": "robot", "value": "x"}]}, "'from' is 'robot'"),
    ({**GOOD, "conversations": [ASK, {"from": "gpt", "value": None}]}, "'value' is null"),
    ({**GOOD, "conversations": [ASK, {"from": "gpt", "value": "\ud83d"}]}, "surrogate pair"),
    ([1, 2], "it is a list"),
    ("text", "it is a str"),
    (None, "it is a NoneType"),
]


@pytest.fixture
def folder(tmp_path):
    save_square(tmp_path / "good.png", "red")
    save_square(tmp_path / "other.png", "blue")
    (tmp_path / "text.png").write_text("text", "utf-8")
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "BMP")
    bomb = bytearray(stream.getvalue())
    bomb[18:26] = (100_000).to_bytes(4, "little") * 2
    (tmp_path / "bomb.bmp").write_bytes(bomb)
    return tmp_path


def build(folder, rows, kind=LLaVADataset, **settings):
    file = folder / "rows.jsonl"
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    file.write_bytes(b"\n".join(lines))
    return kind(
        data_path=str(file),
        image_folder=str(folder),
        image_processor=make_image_processor(),
        tokenizer=make_tokenizer(),
        dataset_map_fn=llava_map_fn,
        template_map_fn=template_map_fn_factory(PROMPT_TEMPLATE.vicuna),
        pad_image_to_square=True,
        **settings,
    )


def test_fifty_broken_rows_are_named_and_none_ends_the_run(folder, caplog):
    rows, said = [GOOD], []
    while len(rows) < 51:
        row, why = BROKEN[len(said) % len(BROKEN)]
        rows.append(row)
        said.append(why)
    made = build(folder, [*rows, GOOD])
    assert made.text_data["rows"][:] == [[0], [51]]  # as they are numbered in the file
    lines = [line for line in caplog.text.splitlines() if "left out" in line]
    assert len(lines) == 50
    for number, (line, why) in enumerate(zip(lines, said, strict=True), 1):
        assert f"rows.jsonl: row {number}: " in line
        assert why.lower() in line.lower()


def test_broken_rows_end_the_run_where_asked(folder):
    with pytest.raises(UserError, match="2 rows are broken") as caught:
        build(folder, [GOOD, BROKEN[0][0], BROKEN[5][0]], bad_images="error")
    assert "row 1: its image is 5" in str(caught.value)
    assert "row 2: " in str(caught.value)
    with pytest.raises(UserError, match="1 rows are broken"):
        build(folder, [None])


def test_a_line_that_is_not_json_is_a_broken_row(folder, caplog):
    made = build(folder, [GOOD, b'{"image": ', GOOD])
    assert made.text_data["rows"][:] == [[0], [2]]
    assert "row 1: line 2: Expecting value" in caplog.text


def test_damaged_images_raise_os_errors_only(tmp_path):
    draw = random.Random(0)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        stream = io.BytesIO()
        Image.effect_noise((24, 16), 50).convert("RGB").save(stream, kind)
        for _ in range(40):
            damaged = bytearray(stream.getvalue())
            for _ in range(draw.choice((1, 4))):
                damaged[draw.randrange(60)] = draw.randrange(256)
            file = tmp_path / "damaged"
            file.write_bytes(damaged[: draw.randrange(20, len(damaged) + 1)])
            (why,) = problems_of([file])
            try:
                load_image(file)
            except OSError:
                continue
            assert why is None


def test_several_images_stand_where_their_marks_are(folder):
    text = "Left <image> and right <image>: the same?"
    row = {"image": ["good.png", "other.png"], "conversations": [{**ASK, "value": text}, SAY]}
    sample = build(folder, [row])[0]
    assert sample["pixel_values"].shape[0] == 2
    assert not (sample["pixel_values"][0] == sample["pixel_values"][1]).all()
    ids = sample["input_ids"]
    first, second = (place for place, token in enumerate(ids) if token == IMAGE)
    tokenizer = make_tokenizer()
    assert tokenizer.decode(ids[:first]).endswith("Left ")
    assert tokenizer.decode(ids[first + 1 : second]).strip() == "and right"
    assert {sample["labels"][first], sample["labels"][second]} == {-100}


def test_one_image_stands_first_in_its_question(folder):
    row = {"image": "good.png", "conversations": [{**ASK, "value": "What is <image> it?"}, SAY]}
    ids = build(folder, [row])[0]["input_ids"]
    assert ids.count(IMAGE) == 1
    after = make_tokenizer().decode(ids[ids.index(IMAGE) + 1 :])
    assert after.startswith("\nWhat is")


def test_an_answer_may_speak_of_image_marks(folder):
    row = {**GOOD, "conversations": [ASK, {**SAY, "value": "I see <image>"}]}
    sample = build(folder, [row])[0]
    assert sample["input_ids"].count(IMAGE) == 1
    assert IMAGE not in sample["labels"]


def test_texts_prepared_ahead_are_the_same(folder):
    made = build(folder, [GOOD, GOOD])
    made.text_data.save_to_disk(str(folder / "ahead"))
    settings = {"image_folder": str(folder), "image_processor": make_image_processor()}
    again = LLaVADataset(offline_processed_text_folder=str(folder / "ahead"), **settings)
    assert again[1]["input_ids"] == made[1]["input_ids"]
    made.text_data.remove_columns(["rows", "length"]).save_to_disk(str(folder / "old"))
    old = LLaVADataset(offline_processed_text_folder=str(folder / "old"), **settings)
    assert old.modality_length == made.modality_length
    with pytest.raises(UserError, match="these are no prepared texts"):
        LLaVADataset(offline_processed_text_folder=str(folder / "none"), **settings)


BOX = {"image": "good.png", "width": 40, "height": 24, "bbox": [0, 0, 20, 24], "sents": ["it"]}


def test_broken_boxes_are_named_and_left_out(folder, caplog):
    broken = [
        ({**BOX, "bbox": [5, 5, 5, 9]}, "empty bbox"),
        ({**BOX, "bbox": ["a", 0, 1, 2]}, "bbox ['a'"),
        ({**BOX, "bbox": [0, 0, float("nan"), 2]}, "bbox [0, 0, nan"),
        ({**BOX, "width": 0}, "width and height [0, 24]"),
        ({**BOX, "sents": "it"}, "sents 'it'"),
        ({**BOX, "image": 3}, "image 3"),
        ({"image": "good.png"}, "no width, height, bbox, sents"),
        (7, "not an object"),
    ]
    made = build(folder, [BOX, *[row for row, _ in broken]], kind=RefCOCOJsonDataset)
    assert len(made) == 1
    for number, (_, why) in enumerate(broken, 1):
        assert f"box {number}: {why}" in caplog.text
