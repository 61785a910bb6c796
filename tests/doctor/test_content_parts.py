"""Rows with images in what examines and shows data: findings, small images, marks and counts."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.image_text import make_image, save_processor
from xtuner.dataset.videos import Clip, VideoShape
from xtuner.doctor.pictures import SIDE, pictures_of
from xtuner.doctor.show import decode_tokens
from xtuner.entry_point import main

CONFIG = """
from datasets import load_dataset
from xtuner.dataset import VisionLanguageDataset
from xtuner.dataset.collate_fns import vision_language_collate_fn
from xtuner.tokenization.processor import load_processor

processor = dict(type=load_processor, name_or_path={model!r})
train_dataloader = dict(
    dataset=dict(
        type=VisionLanguageDataset,
        dataset=dict(type=load_dataset, path="json", data_files={file!r}),
        processor=processor,
        max_length=64,
        pack_to_max_length=False,
        {more}
    ),
    collate_fn=dict(type=vision_language_collate_fn, processor=processor),
)
"""


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ROWS = [
    {"images": ["0.png", "1.png"], "messages": talk("<image> and <image>?", "Two.")},
    {"images": ["none.png"], "messages": talk("<image>?", "Gone.")},
    {"images": ["text.png"], "messages": talk("<image>?", "Bad.")},
    {"images": [], "messages": talk("<image>?", "No image.")},
    {"images": ["0.png"], "messages": talk("<image>? " + "long " * 40, "Long.")},
    {"images": ["0.png"], "messages": talk("<image>?", "undefined")},
    {"images": ["0.png"], "messages": [{"role": "user", "content": "<image>?"}]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    (root / "model").mkdir()
    save_processor(root / "model", "qwen2_5_vl")
    make_image(56, 28, 0).save(root / "0.png")
    make_image(400, 300, 1).save(root / "1.png")
    (root / "text.png").write_text("text")
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), "utf-8")
    return root


def config(folder, more="", name="config.py"):
    file = folder / name
    text = CONFIG.format(model=str(folder / "model"), file=str(folder / "rows.jsonl"), more=more)
    file.write_text(text, "utf-8")
    return str(file)


def examined(folder, capsys, more=""):
    status = main(["check-custom-dataset", config(folder, more), "--json"])
    found = json.loads(capsys.readouterr().out)
    return status, {
        (finding["code"], place["line"]): place.get("detail", "")
        for finding in found["findings"]
        for place in finding["places"]
    }


def test_rows_that_cannot_be_used_are_findings(folder, capsys):
    status, found = examined(folder, capsys)
    assert status == 0
    assert {
        ("left-out", 2), ("left-out", 3), ("left-out", 4), ("too-long", 5), ("placeholder", 6),
        ("no-answer", 7),
    } <= set(found)  # fmt: skip
    assert "none.png: No such file" in found["left-out", 2]
    assert "text.png: is no image" in found["left-out", 3]
    assert "1 <image> in the text, 0 images" in found["left-out", 4]


def test_a_strict_dataset_has_errors(folder, capsys):
    status, found = examined(folder, capsys, "bad_rows='error', long_samples='error'")
    assert status == 1
    assert {("bad-row", 2), ("bad-row", 3), ("bad-row", 4), ("too-long", 5)} <= set(found)


def test_the_report_shows_a_row_with_its_images(folder, capsys):
    page = folder / "report.html"
    assert main(["check-custom-dataset", config(folder), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "2 images: 56 x 28, 400 x 300" in out and "<|image_pad|>" in out
    assert len(images_in(page)) == 2


def images_in(page):
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page.read_text("utf-8"))
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_log_dataset_shows_images_and_counts(folder, capsys):
    page = folder / "sample.html"
    arguments = ["log-dataset", config(folder), "--index", "0", "--html", str(page)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "rows.jsonl:1" in out and "2 images: 56 x 28, 400 x 300" in out
    assert out.count("<|image_pad|>") == 4 and "Two." in out
    small = images_in(page)
    assert [image.size for image in small] == [(56, 28), (SIDE, 120)]


def test_pictures_are_small_and_runs_of_tokens_are_counted():
    ((one,), ()) = pictures_of([[make_image(1000, 500, 0)], []])
    assert str(one) == "1000 x 500" and len(one.uri) < 20_000
    ids = [1, 7, 7, 7, 7, 7, 2, 2, 2, -200]
    shown = decode_tokens(ids, lambda tokens: "".join(f"[{token}]" for token in tokens))
    assert shown == "[1][7]×5[2][2][2]<image>"


PAIRS = [
    {"prompt": "<image>What?", "chosen": "A dog.", "rejected": "No.", "images": ["0.png"]},
    {"prompt": "<image>What?", "chosen": "A cat.", "rejected": "No.", "images": ["none.png"]},
    {"prompt": "<image>Why?", "chosen": "So.", "rejected": "No " * 99, "images": ["0.png"]},
    {"prompt": "<image>Who?", "chosen": "I.", "images": ["0.png"]},
]


def test_tokens_of_pairs_are_counted_and_shown(folder, capsys):
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)), "utf-8")
    file = Path(config(folder, name="pairs.py"))
    text = file.read_text("utf-8").replace("rows.jsonl", "pairs.jsonl")
    file.write_text(text.replace("VisionLanguageDataset", "VisionLanguagePreferenceDataset"))
    main(["check-custom-dataset", str(file), "--json"])
    found = json.loads(capsys.readouterr().out)
    places = {
        (finding["code"], place["line"]): place.get("detail", "")
        for finding in found["findings"]
        for place in finding["places"]
    }
    assert {("left-out", 2), ("too-long", 3), ("left-out", 4)} <= set(places)
    assert "none.png: No such file" in places["left-out", 2]
    assert "it has no rejected answer" in places["left-out", 4]
    assert main(["check-custom-dataset", str(file)]) == 0
    out = capsys.readouterr().out
    assert "A dog." in out and "No." in out and "tokens" in out
    assert main(["log-dataset", str(file), "--index", "0"]) == 0
    out = capsys.readouterr().out
    assert out.count("1 images: 56 x 28") == 2 and out.count("pairs.jsonl:1") == 2


def test_frames_of_a_video_are_shown_side_by_side():
    shape = VideoShape(320, 160, 9, 4.0, tuple(range(9)))
    clip = Clip(shape, [make_image(320, 160, number) for number in range(9)])
    ((one,),) = pictures_of([[clip]])
    assert str(one) == "9 frames of 320 x 160"
    data = base64.b64decode(one.uri.partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (3 * SIDE, SIDE // 2)
