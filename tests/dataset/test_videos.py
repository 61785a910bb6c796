"""Videos from files and lists of frames: read, counted, never trained, never cut, named if bad."""

from __future__ import annotations

import base64
import json
import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from tests.helpers.image_text import image_text_folder, make_image
from tests.helpers.videos import load_with_videos, make_video
from xtuner.dataset import VisionLanguageDataset, VisionLanguagePreferenceDataset
from xtuner.dataset.collate_fns import vision_language_collate_fn
from xtuner.dataset.videos import FrameSampling, VideoShape, read_frames, read_header
from xtuner.dataset.vision_language.content_parts import conversation_of
from xtuner.dataset.vision_language.placeholders import ImagePlaceholders
from xtuner.tokenization.processor import load_processor
from xtuner.utils.errors import UserError

ASK, SAY = {"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "zap"}
SIZE, COUNT, FPS = (56, 28), 9, 4.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video, five frames of another, and files that are none."""
    folder = tmp_path_factory.mktemp("videos")
    make_video(folder / "a.mp4", COUNT, SIZE, FPS)
    for number in range(5):
        make_image(40, 30, number).save(folder / f"{number}.png")
    (folder / "text.mp4").write_text("no video", "utf-8")
    (folder / "empty.mp4").touch()
    data = (folder / "a.mp4").read_bytes()
    (folder / "headless.mp4").write_bytes(data[: len(data) // 2])  # the index is at the end
    (folder / "photo.mp4").write_bytes((folder / "0.png").read_bytes()[:60])
    return folder


@pytest.fixture(scope="module")
def qwen() -> Any:
    return load_with_videos(image_text_folder("qwen2_5_vl"))


def dataset_of(folder: Path, processor: Any, rows: list[Any], **settings: Any) -> Any:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    source = dict(type=load_dataset, path="json", data_files=str(file))
    settings = {"pack_to_max_length": False, "max_length": 4096, "video_frames": 4} | settings
    return VisionLanguageDataset(source, processor, **settings)


def parts(**fields: Any) -> dict[str, Any]:
    return {"messages": [{**ASK, "content": [fields, {"type": "text", "text": "What?"}]}, SAY]}


FRAMES = [f"{number}.png" for number in range(5)]
CONVERSATIONS = [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "zap"}]
UNMARKED = [{**ASK, "content": "What?"}, SAY]
FILES: dict[str, dict[str, Any]] = {
    "ms-swift": {"messages": [ASK, SAY], "videos": ["a.mp4"]},
    "LLaMA-Factory": {"conversations": CONVERSATIONS, "videos": ["a.mp4"]},
    "one, not a list": {"messages": [ASK, SAY], "video": "a.mp4"},
    "unmarked": {"messages": UNMARKED, "videos": ["a.mp4"]},
    "question": {"video": "a.mp4", "question": "What?", "answer": "zap"},
    "video": parts(type="video", video="a.mp4"),
    "with its fps": parts(type="video", video="a.mp4", fps=1.0),
    "video_url": parts(type="video_url", video_url={"url": "a.mp4"}),
    "a path": parts(type="video", path="a.mp4"),
    "no type": parts(video="a.mp4"),
    "a mark without a file": parts(type="video") | {"videos": ["a.mp4"]},
    "objects": {"messages": [ASK, SAY], "videos": [{"path": "a.mp4", "bytes": None}]},
    "WebDataset": {
        "__key__": "1",
        "mp4": {"path": "a.mp4", "bytes": None},
        "json": {"question": "What?", "answer": "zap"},
    },
}
LISTS: dict[str, dict[str, Any]] = {
    "ms-swift": {"messages": [ASK, SAY], "videos": [FRAMES]},
    "one video": {"messages": [ASK, SAY], "video": FRAMES},
    "Qwen's": parts(type="video", video=FRAMES, fps=2.0),
    "objects": parts(type="video", video=[{"type": "image", "image": name} for name in FRAMES]),
    "frames": {"messages": [ASK, SAY], "videos": [{"frames": FRAMES, "fps": 2}]},
}


@pytest.mark.parametrize("row", [*FILES.values(), *LISTS.values()])
def test_every_layout_gives_the_same_conversation(row):
    found = conversation_of(row)
    (video,) = found.images
    places = [frame.place for frame in video.frames]
    assert video.place == "a.mp4" if not places else places == FRAMES
    assert [(message["role"], message["content"]) for message in found.messages] == [
        ("user", [{"type": "video"}, {"type": "text", "text": "What?"}]),
        ("assistant", [{"type": "text", "text": "zap"}]),
    ]


def test_images_come_before_videos_and_numbers_choose():
    row = {"messages": UNMARKED, "images": ["0.png"], "videos": ["a.mp4", "b.mp4"]}
    found = conversation_of(row)
    assert [ref.place for ref in found.images] == ["0.png", "a.mp4", "b.mp4"]
    kinds = [part["type"] for part in found.messages[0]["content"]]
    assert kinds == ["image", "video", "video", "text"]
    numbered = parts(type="video", index=1) | {"videos": ["a.mp4", "b.mp4"]}
    assert [ref.place for ref in conversation_of(numbered).images] == ["b.mp4"]


def test_frames_are_spread_over_a_video():
    assert FrameSampling(4).of(9, 4.0) == (0, 3, 5, 8)
    assert FrameSampling(8, fps=2.0).of(9, 4.0) == (0, 3, 5, 8)  # 2.25 seconds
    assert FrameSampling(8, fps=None).of(3, 4.0) == (0, 1, 2)
    assert FrameSampling(4, exactly=True).of(3, 4.0) == (0, 1, 1, 2)
    assert FrameSampling(8, fps=0.01).of(9, 4.0) == (0,)


def test_a_file_is_read_by_its_header_and_its_frames_in_order(folder):
    header = read_header(folder / "a.mp4")
    assert header == VideoShape(*SIZE, COUNT, FPS)
    frames = read_frames(folder / "a.mp4", header._replace(used=(0, 3, 3, 8)))
    for number, frame in zip((0, 3, 3, 8), frames, strict=True):
        assert frame.size == SIZE
        drawn = np.asarray(make_image(*SIZE, number), dtype=float)
        others = [np.asarray(make_image(*SIZE, other), dtype=float) for other in (1, 5)]
        errors = [np.abs(np.asarray(frame) - each).mean() for each in (drawn, *others)]
        assert errors[0] < min(errors[1:]) / 2, number
    with pytest.raises(OSError, match="breaks off after 9 of 99 frames"):
        read_frames(folder / "a.mp4", VideoShape(*SIZE, 99, FPS, (0, 98)))


def test_placeholders_are_counted_and_never_trained(folder, qwen):
    image_row = {
        "messages": [{**ASK, "content": "<image>or<video>"}, SAY],
        "images": ["0.png"],
        "videos": ["a.mp4"],
    }
    data = dataset_of(folder, qwen, [FILES["ms-swift"] | {"images": []}, image_row])
    ids = {name: qwen.tokenizer.convert_tokens_to_ids(name) for name in ("<|video_pad|>", "zap")}
    for row in (data[0], data[1]):
        video = ids["<|video_pad|>"]
        assert row["input_ids"].count(video) == 4  # two frames at a time, two tokens each
        assert video not in row["labels"]
    (clip,) = data[0]["images"][0]
    assert clip.shape == VideoShape(*SIZE, COUNT, FPS, (0, 3, 5, 8))
    assert [type(each).__name__ for each in data[1]["images"][0]] == ["Image", "Clip"]
    costs = [4 * 56 * 28, 40 * 30 + 4 * 56 * 28]
    wanted = [n + cost // 28**2 for n, cost in zip(data.length, costs, strict=True)]
    assert data.modality_length == wanted


def test_no_row_is_cut_and_frames_are_scaled(folder):
    make_video(folder / "large.mp4", 6, (224, 112), 2)
    rows = [{"messages": [ASK, SAY], "videos": ["large.mp4"]}]
    processor = load_with_videos(image_text_folder("qwen2_5_vl"))
    processor.video_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 64 * 28 * 28}
    (length,) = dataset_of(folder, processor, rows).length
    with pytest.raises(UserError, match="longer than max_length"):
        dataset_of(folder, processor, rows, max_length=length - 1)
    with pytest.raises(UserError, match=f"has {length} tokens"):
        dataset_of(folder, processor, rows, max_length=length - 1, long_samples="error")
    scaled = dataset_of(folder, processor, rows, max_pixels=56 * 28)
    assert scaled.length[0] == length - 2 * (8 * 4 - 2)
    (clip,) = scaled[0]["images"][0]
    assert clip.frames[0].size == clip.shape[:2] == SIZE
    shrunk = dataset_of(folder, processor, rows, max_length=length - 8, long_samples="shrink")
    assert length - 32 < shrunk.length[0] <= length - 8


def test_frames_in_memory_and_videos_in_bytes(folder, qwen):
    data = (folder / "a.mp4").read_bytes()
    uri = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    frames = [Image.open(folder / name) for name in FRAMES]
    rows = [FILES["ms-swift"], {"messages": [ASK, SAY], "videos": [uri]}]
    made = dataset_of(folder, qwen, rows)
    first, second = (made[index]["images"][0][0] for index in range(2))
    assert first.shape == second.shape
    assert np.array_equal(first.array(), second.array())
    (ref,) = conversation_of({"messages": [ASK, SAY], "videos": [frames]}).images
    shape = ref.shape(folder, FrameSampling(3))
    assert shape == VideoShape(40, 30, 5, 2.0, (0, 2, 4))
    read = ref.clip(folder, shape)
    assert np.array_equal(read.array()[1], np.asarray(frames[2].convert("RGB")))


BAD = {
    "missing.mp4": "No such file",
    "text.mp4": "is no video",
    "empty.mp4": "is no video",
    "headless.mp4": "is no video",
    "photo.mp4": "is no video",
    "../a.mp4": "outside image_folder",
}


def test_libraries_print_nothing_about_broken_videos(folder, capfd):
    for name in ("text.mp4", "empty.mp4", "headless.mp4"):
        with pytest.raises(OSError, match="is no video"):
            read_header(folder / name)
    assert "VIDEOIO" not in capfd.readouterr().err


def test_broken_videos_are_named_and_end_no_run(folder, qwen, caplog):
    rows = [{"messages": [ASK, SAY], "videos": [name]} for name in ("a.mp4", *BAD)]
    rows.append({"messages": [ASK, SAY], "videos": []})
    with caplog.at_level(logging.WARNING):
        assert len(dataset_of(folder, qwen, rows)) == 1
    for line, (name, why) in enumerate(BAD.items(), 2):
        assert any(f"rows.jsonl:{line}: " in m and name in m and why in m for m in caplog.messages)
    assert any("1 <video> in the text, 0 videos" in message for message in caplog.messages)
    with pytest.raises(UserError, match=r"text\.mp4: is no video"):
        dataset_of(folder, qwen, rows[:3], bad_rows="error")
    frames = {"messages": [ASK, SAY], "videos": [["0.png", "text.mp4"]]}
    with pytest.raises(UserError, match=r"a video of 2 frames: text\.mp4: is no image"):
        dataset_of(folder, qwen, [frames], bad_rows="error")


def test_a_video_that_breaks_later_is_black_and_not_trained(folder, qwen, caplog):
    make_video(folder / "later.mp4", COUNT, SIZE, FPS)
    rows = [FILES["ms-swift"], {"messages": [ASK, SAY], "videos": ["later.mp4"]}]
    data = dataset_of(folder, qwen, rows)
    make_video(folder / "later.mp4", COUNT - 2, SIZE, FPS)
    row = data[1]
    assert "later.mp4: it is 56 x 28 x 7, and was 56 x 28 x 9" in caplog.text
    assert set(row["labels"]) == {-100}
    assert not row["images"][0][0].array().any()
    batch = vision_language_collate_fn([data[0], row], qwen)["data"]
    assert len(batch["images"]["video_grid_thw"]) == 2


def test_what_takes_no_videos_says_so_before_the_run(folder, qwen, monkeypatch):
    rows = [FILES["ms-swift"]]
    with pytest.raises(UserError, match="Gemma3Processor takes no videos"):
        dataset_of(folder, load_with_videos(image_text_folder("gemma3")), rows)
    smolvlm = load_with_videos(image_text_folder("smolvlm"))
    both = {"messages": [{**ASK, "content": "<image><video>"}, SAY], "images": ["0.png"]}
    with pytest.raises(UserError, match="takes no images and videos in one row"):
        dataset_of(folder, smolvlm, [both | {"videos": ["a.mp4"]}], bad_rows="error")
    if find_spec("torchvision") is None:
        with pytest.raises(UserError, match="videos need torchvision"):
            dataset_of(folder, load_processor(image_text_folder("qwen2_5_vl")), rows)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="read with OpenCV"):
        dataset_of(folder, qwen, [FILES["ms-swift"]], video_frames=3)


def test_classes_that_stack_videos_get_equally_many_frames(folder):
    known = {
        kind: ImagePlaceholders(load_with_videos(image_text_folder(kind)))
        for kind in ("llava_onevision", "qwen2_5_vl")
    }
    assert {kind: each.videos.need_equal_lengths for kind, each in known.items()} == {
        "llava_onevision": True,
        "qwen2_5_vl": False,
    }
    rows = [FILES["ms-swift"], {"messages": [ASK, SAY], "videos": [["0.png", "1.png"]]}]
    file = folder / "lists.jsonl"
    file.write_text("\n".join(map(json.dumps, rows[1:])), "utf-8")
    processor = known["llava_onevision"].processor
    one, other = (dataset_of(folder, processor, [row])[0] for row in rows)
    assert [len(row["images"][0][0].frames) for row in (one, other)] == [4, 4]
    batch = vision_language_collate_fn([one, other], processor)["data"]
    assert batch["images"]["pixel_values_videos"].shape[:2] == (2, 4)


def test_pairs_of_answers_about_a_video(folder, qwen):
    pair = {"prompt": "<video>What?", "chosen": "zap", "rejected": "zip zip", "videos": ["a.mp4"]}
    file = folder / "pairs.jsonl"
    file.write_text(json.dumps(pair), "utf-8")
    source = dict(type=load_dataset, path="json", data_files=str(file))
    data = VisionLanguagePreferenceDataset(source, qwen, 4096, video_frames=4)
    batch = vision_language_collate_fn([data[0]], qwen)["data"]
    assert len(batch["images"]["video_grid_thw"]) == 2
