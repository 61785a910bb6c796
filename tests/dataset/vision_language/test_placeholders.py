"""The text of an image's placeholder by its size: what the processor writes, mostly by counting."""

import random

import pytest
from PIL import Image

from xtuner.dataset.videos import VideoShape
from xtuner.dataset.vision_language.placeholders import (
    VERIFIED,
    ImagePlaceholders,
    placeholders_of,
    require_images,
)
from xtuner.registry import BUILDER
from xtuner.utils.errors import UserError


def sizes_of(seed, count):
    draw = random.Random(seed)
    return [(draw.randint(20, 120), draw.randint(20, 120)) for _ in range(count)]


def test_texts_are_those_of_the_processor_and_mostly_counted(family, monkeypatch):
    known = ImagePlaceholders(BUILDER.build(family))
    processed = []
    own = known.process
    monkeypatch.setattr(
        known,
        "process",
        lambda images, **settings: processed.append(1) or own(images, **settings),
    )
    sizes = sizes_of(0, VERIFIED * 3)
    for size in sizes:
        known.texts([size])
    counted = len(sizes) - len(processed)
    # Pixtral's text has line breaks, so that it is not told by a number alone.
    is_counted = "mistral3" not in family["name_or_path"]
    assert (counted > VERIFIED / 2) if is_counted else not counted
    for size in [*sizes[-10:], *sizes[:3]]:
        _, (text,) = own([[Image.new("RGB", size)]])
        assert known.texts([size]) == [text]
    for pair in (sizes[:2], sizes[-3:]):
        _, texts = own([[Image.new("RGB", size) for size in pair]])
        assert known.texts(pair) == texts


def test_a_count_that_is_wrong_is_not_used(qwen, monkeypatch):
    processor = BUILDER.build(qwen)
    known = ImagePlaceholders(processor)
    monkeypatch.setattr(
        type(processor), "_get_num_multimodal_tokens", lambda *_, **__: {"num_image_tokens": [7]}
    )
    sizes = sizes_of(1, VERIFIED * 2)
    expected = ImagePlaceholders(BUILDER.build(qwen)).process(
        [[Image.new("RGB", s)] for s in sizes]
    )
    assert [known.texts([size])[0] for size in sizes] == expected[1]


def test_a_size_that_the_processor_refuses(qwen):
    known = placeholders_of(qwen)
    with pytest.raises(ValueError, match=r"5000 x 10 pixels: absolute aspect ratio"):
        known.texts([(5000, 10)])


def test_placeholders_are_found_and_are_as_many_as_images(qwen):
    known = placeholders_of(qwen)
    assert known is placeholders_of(dict(qwen))
    text = f"a{known.token}b<|video_pad|>"
    (image, first), (video, second) = known.find(text)
    assert (text[slice(*image)], first) == (known.token, "image")
    assert (text[slice(*video)], second) == ("<|video_pad|>", "video")
    size, clip = (28, 28), VideoShape(28, 28, 2, 1.0, (0, 1))
    known.require(["image", "video"], [size, clip])
    for found, shapes, said in (
        (["image", "image"], [size], "2 .* in the text for 1 images"),
        (["video"], [], "1 .* in the text for 0 videos"),
        ([], [clip], "0 .* in the text for 1 videos"),
        (["video", "image"], [size, clip], "in another order"),
    ):
        with pytest.raises(ValueError, match=said):
            known.require(found, shapes)


def test_a_processor_without_template_or_token_is_refused(qwen):
    processor = BUILDER.build(qwen)
    processor.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        require_images(processor)
    processor.image_token = None
    with pytest.raises(UserError, match="which token stands for an image"):
        require_images(processor)
