"""A video is a file, a folder of frames or a list of them; what is wrong with it is named."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.image_text import make_image
from xtuner.dataset.videos import FrameSampling, VideoShape
from xtuner.dataset.vision_language.video_refs import video_ref
from xtuner.utils.errors import BadRowError


@pytest.fixture
def folder(tmp_path):
    """Frames in a folder, with another file; an empty one, and a file that is no image."""
    (tmp_path / "frames").mkdir()
    for number in (1, 2, 10):
        make_image(40, 30, number).save(tmp_path / "frames" / f"frame{number}.png")
    (tmp_path / "frames/about.txt").write_text("from a camera", "utf-8")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "text.png").write_text("no image", "utf-8")
    return tmp_path


@pytest.mark.parametrize("name", ["frames", "frames/"])
def test_a_folder_of_frames_is_a_video(folder, name):
    """In the order of their numbers, not of their digits."""
    video = video_ref(name)
    shape = video.shape(folder, FrameSampling())
    assert shape == VideoShape(40, 30, 3, 2.0, (0, 1, 2))
    clip = video.clip(folder, shape)
    for number, frame in zip((1, 2, 10), clip.array(), strict=True):
        assert np.array_equal(frame, np.asarray(make_image(40, 30, number)))
    smaller = video.clip(folder, shape._replace(width=20, height=15, used=(0, 2)))
    assert smaller.array().shape == (2, 15, 20, 3)


def test_frames_per_second_of_a_list_are_those_of_the_row(folder):
    names = [f"frames/frame{number}.png" for number in (1, 2, 10)]
    shape = video_ref({"video": names, "fps": 1}).shape(folder, FrameSampling())
    assert (shape.fps, shape.used) == (1.0, (0, 1, 2))
    assert video_ref(names).shape(folder, FrameSampling(2)).used == (0, 2)


@pytest.mark.parametrize(
    ("video", "why"),
    [
        ("nothing", "is a folder without images"),
        (["frames/frame1.png", "text.png"], "text.png: is no image"),
        (["frames/frame1.png", "none.png"], "none.png: No such file"),
        ("none.mp4", "No such file"),
        ("text.png", "is no video"),
    ],
)
def test_what_is_wrong_is_named(folder, video, why):
    with pytest.raises(OSError, match=why):
        video_ref(video).shape(folder, FrameSampling())


def test_no_video_leaves_the_folder(folder):
    for video in ("../frames", ["frames/frame1.png", "../a.png"]):
        with pytest.raises(BadRowError, match="outside image_folder"):
            video_ref(video).shape(folder, FrameSampling())
