"""Broken and odd images: none ends a run, each that cannot be used is named with its line."""

import base64
import io
import random

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from tests.dataset.vision_language.conftest import talk, write_rows
from tests.helpers.image_text import make_image
from xtuner.dataset import VisionLanguageDataset
from xtuner.dataset.collate_fns import vision_language_collate_fn
from xtuner.dataset.images import ORIENTATION, decode_image, load_image, read_size
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.errors import UserError

PHOTO = make_image(40, 30, 0)
GOOD, BAD, BREAKS = "good", "bad", "breaks"
"""It is trained on; it is left out; it is seen to be broken when it is decoded."""


def saved(image=PHOTO, kind="PNG", **settings):
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def rotated(orientation, kind="JPEG"):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return saved(kind=kind, exif=exif)


def deep(dtype, mode=None):
    values = np.linspace(0, np.iinfo(dtype).max, 1200).astype(dtype).reshape(30, 40)
    return Image.fromarray(values, mode)


def bomb():
    data = bytearray(saved(kind="BMP"))
    data[18:26] = (100_000).to_bytes(4, "little") * 2
    return bytes(data)


def large():
    """More pixels than a photograph has, fewer than Pillow refuses by itself."""
    data = bytearray(saved(kind="BMP"))
    data[18:26] = (10_000).to_bytes(4, "little") * 2
    return bytes(data)


def flipped(data, count, seed, first=64):
    draw, changed = random.Random(seed), bytearray(data)
    for _ in range(count):
        changed[draw.randrange(first, len(changed))] ^= 0xFF
    return bytes(changed)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
FRAMES = [make_image(40, 30, seed) for seed in range(3)]
PALETTE = PHOTO.quantize(16)

# By the name of the file: what is in it, and what becomes of its row.
FILES = {
    "plain.png": (saved(), GOOD),
    "gray.png": (saved(PHOTO.convert("L")), GOOD),
    "gray_alpha.png": (saved(PHOTO.convert("LA")), GOOD),
    "black_and_white.png": (saved(PHOTO.convert("1")), GOOD),
    "alpha.png": (saved(PHOTO.convert("RGBA")), GOOD),
    "palette.png": (saved(PALETTE), GOOD),
    "palette_alpha.png": (saved(PALETTE, transparency=bytes(range(16))), GOOD),
    "palette_key.gif": (saved(PALETTE, "GIF", transparency=3), GOOD),
    "cmyk.jpg": (saved(PHOTO.convert("CMYK"), "JPEG"), GOOD),
    "cmyk.tif": (saved(PHOTO.convert("CMYK"), "TIFF"), GOOD),
    "ycbcr.jpg": (saved(PHOTO.convert("YCbCr"), "JPEG"), GOOD),
    "lab.tif": (saved(PHOTO.convert("RGB").convert("LAB"), "TIFF"), GOOD),
    "16_bit.png": (saved(deep(np.uint16)), GOOD),
    "16_bit.tif": (saved(deep(np.uint16), "TIFF"), GOOD),
    "32_bit.tif": (saved(deep(np.int32), "TIFF"), GOOD),
    "float.tif": (saved(PHOTO.convert("F"), "TIFF"), GOOD),
    "animated.gif": (saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), GOOD),
    "animated.png": (saved(FRAMES[0], save_all=True, append_images=FRAMES[1:]), GOOD),
    "animated.webp": (saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), GOOD),
    "pages.tif": (saved(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), GOOD),
    "frames.mpo": (saved(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:]), GOOD),
    **{f"turned_{n}.jpg": (rotated(n), GOOD) for n in range(1, 9)},
    "turned.png": (rotated(6, "PNG"), GOOD),
    "turned.webp": (rotated(6, "WEBP"), GOOD),
    "turned.tif": (rotated(6, "TIFF"), GOOD),
    "turned_77.jpg": (rotated(77), GOOD),
    "progressive.jpg": (saved(kind="JPEG", progressive=True), GOOD),
    "interlaced.png": (saved(interlace=True), GOOD),
    "jpeg_named.png": (saved(kind="JPEG"), GOOD),
    "no_suffix": (saved(kind="WEBP"), GOOD),
    "photo.JPG": (saved(kind="JPEG"), GOOD),
    "photo.avif": (saved(kind="AVIF"), GOOD),
    "photo.jp2": (saved(kind="JPEG2000"), GOOD),
    "photo.bmp": (saved(kind="BMP"), GOOD),
    "photo.ppm": (saved(kind="PPM"), GOOD),
    "photo.tga": (saved(kind="TGA"), GOOD),
    "photo.ico": (saved(kind="ICO"), GOOD),
    "größe 照片.png": (saved(), GOOD),
    "trailing.png": (saved() + b"more" * 100, GOOD),
    "one.png": (saved(Image.new("RGB", (1, 1))), GOOD),
    "wide.png": (saved(Image.new("RGB", (190, 1))), GOOD),
    "too_wide.png": (saved(Image.new("RGB", (5000, 2))), BAD),
    "too_high.png": (saved(Image.new("RGB", (2, 5000))), BAD),
    "empty.png": (b"", BAD),
    "text.png": (b"this is text", BAD),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", BAD),
    "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', BAD),
    "paper.pdf": (b"%PDF-1.4\n%%EOF", BAD),
    "script.eps": (saved(kind="EPS"), BAD),
    "zeros.jpg": (bytes(5000), BAD),
    "header_only.png": (saved()[:20], BAD),
    "header_only.jpg": (saved(kind="JPEG")[:10], BAD),
    "bomb.bmp": (bomb(), BAD),
    "large.bmp": (large(), BAD),
    "cut.png": (saved(NOISE)[:4000], BREAKS),
    "cut.jpg": (saved(NOISE, "JPEG")[:1500], BREAKS),
    "cut.webp": (saved(NOISE, "WEBP", lossless=True)[:6000], BAD),
    "cut.gif": (saved(NOISE, "GIF")[:2000], BREAKS),
    "cut.bmp": (saved(NOISE, "BMP")[:4000], BREAKS),
    "cut.tif": (saved(NOISE, "TIFF", compression="tiff_lzw")[:4000], BAD),
    "flipped.png": (flipped(saved(NOISE), 50, 0), BREAKS),
}

# Values of a row's image that are no file of the folder.
VALUES = {
    "missing.png": BAD,
    "../outside.png": BAD,
    "a/../../outside.png": BAD,
    "a\0b.png": BAD,
    "x" * 900: BAD,
    ".": BAD,
    "data:image/png;base64," + base64.b64encode(saved()).decode(): GOOD,
    "data:image/png;base64," + base64.b64encode(saved()[:20]).decode(): BAD,
    "data:image/png;base64,@@": BAD,
    "ftp://example.com/a.png": BAD,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("odd")
    (root / "outside.png").write_bytes(saved())
    photos = root / "photos"
    photos.mkdir()
    for name, (data, _) in FILES.items():
        (photos / name).write_bytes(data)
    return photos


def test_no_odd_image_ends_a_run_and_each_broken_one_is_named(folder, qwen, caplog):
    expected = {name: fate for name, (_, fate) in FILES.items()} | VALUES
    assert len(expected) >= 50
    rows = [{"image": name, "question": "What?", "answer": "That."} for name in expected]
    file = write_rows(folder.parent, rows)
    source = dict(type=load_dataset, path="json", data_files=str(file))
    made = VisionLanguageDataset(source, qwen, image_folder=str(folder), max_length=512)
    fates = list(expected.values())
    left_out = [line for line in caplog.text.splitlines() if "left out" in line]
    bad = [number for number, fate in enumerate(fates) if fate == BAD]
    assert len(left_out) == len(bad)
    for number, line in zip(bad, left_out, strict=True):
        assert f"rows.jsonl:{number + 1}: " in line
    caplog.clear()
    batches = [made[number] for number in range(len(made))]
    for batch in batches:
        vision_language_collate_fn([batch], qwen, use_varlen_attn=True)
    not_trained = [line for line in caplog.text.splitlines() if "not trained on" in line]
    breaks = [number for number, fate in enumerate(fates) if fate == BREAKS]
    for number in breaks:
        assert any(f"rows.jsonl:{number + 1}: " in line for line in not_trained)
    assert len(not_trained) == len(breaks)
    trained = set()
    for batch in batches:
        bounds = batch["cumulative_len"]
        for row, start, stop in zip(batch["rows"], bounds[:-1], bounds[1:], strict=True):
            if any(label != IGNORE_INDEX for label in batch["labels"][start:stop]):
                trained.add(row)
    assert trained == {number for number, fate in enumerate(fates) if fate == GOOD}


def test_broken_rows_end_the_run_before_it_begins_where_asked(folder, qwen):
    rows = [
        {"image": name, "question": "What?", "answer": "That."}
        for name in ("plain.png", "missing.png", "text.png")
    ]
    rows.append({"messages": talk("<image>What?", "That.")})
    file = write_rows(folder.parent, rows, "strict.jsonl")
    source = dict(type=load_dataset, path="json", data_files=str(file))
    with pytest.raises(UserError, match="rows that cannot be used") as caught:
        VisionLanguageDataset(source, qwen, image_folder=str(folder), bad_rows="error")
    said = str(caught.value).splitlines()
    assert any("strict.jsonl:2: " in line and "No such file" in line for line in said)
    assert any("strict.jsonl:3: " in line and "is no image" in line for line in said)
    assert any("strict.jsonl:4: 1 <image> in the text, 0 images" in line for line in said)


@pytest.mark.parametrize("name", [name for name, (_, fate) in FILES.items() if fate == GOOD])
def test_sizes_by_the_header_are_those_of_the_decoded_image(folder, name):
    assert decode_image(folder / name).size == read_size(folder / name)


def test_turned_photos_are_shown_upright():
    tall = io.BytesIO(rotated(6))
    assert read_size(tall) == (30, 40)
    upright = np.asarray(decode_image(tall)).astype(int)
    plain = np.asarray(Image.open(io.BytesIO(saved(kind="JPEG")))).astype(int)
    assert np.abs(upright - np.rot90(plain, -1)).max() == 0


def test_load_image_turns_where_asked(tmp_path):
    (tmp_path / "a.jpg").write_bytes(rotated(8))
    assert load_image(tmp_path / "a.jpg").size == (40, 30)
    assert load_image(tmp_path / "a.jpg", upright=True).size == (30, 40)
