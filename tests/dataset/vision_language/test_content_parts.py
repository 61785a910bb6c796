"""Every layout of rows with images: the same messages, the same images."""

import base64
import io
import json
import re

import pytest
from datasets import Dataset, Features, List, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from xtuner.dataset.images import read_size
from xtuner.dataset.vision_language.content_parts import conversation_of
from xtuner.dataset.vision_language.source_rows import SourceRows
from xtuner.utils.errors import BadRowError


def encoded(width=6, height=4, kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(stream, kind)
    return stream.getvalue()


DATA = encoded()
BASE64 = base64.b64encode(DATA).decode()
URI = f"data:image/png;base64,{BASE64}"
ASK = {"role": "user", "content": "<image>What?"}
SAY = {"role": "assistant", "content": "A dog."}


def part(**fields):
    question = [fields, {"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": question}, SAY]}


SHAREGPT = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A dog."}]
UNMARKED = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]

# All of these ask "What?" about one image named a.png, and are told "A dog.".
LAYOUTS = {
    "OpenAI, image_url": part(type="image_url", image_url={"url": "a.png"}),
    "OpenAI, image_url as text": part(type="image_url", image_url="a.png"),
    "Responses API": part(type="input_image", image_url="a.png"),
    "image": part(type="image", image="a.png"),
    "url": part(type="image", url="a.png"),
    "path": part(type="image", path="a.png"),
    "Qwen's, without a type": part(image="a.png"),
    "fields that Arrow filled": part(type="image", image="a.png", text=None, image_url=None),
    "file address": part(type="image", image="file://a.png"),
    "TRL's: marks without an image": part(type="image") | {"images": ["a.png"]},
    "marks with a number": part(type="image", index=0, text=None) | {"images": ["a.png"]},
    "ms-swift": {"messages": [ASK, SAY], "images": ["a.png"]},
    "one image, not a list": {"messages": [ASK, SAY], "image": "a.png"},
    "ms-swift's query": {"query": "<image>What?", "response": "A dog.", "images": ["a.png"]},
    "LLaMA-Factory's ShareGPT": {"conversations": SHAREGPT, "images": ["a.png"]},
    "LLaVA": {"id": 7, "conversations": SHAREGPT, "image": "a.png"},
    "LLaVA without marks": {"conversations": UNMARKED, "image": "a.png"},
    "objects": {"messages": [ASK, SAY], "images": [{"path": "a.png", "bytes": None}]},
    "question": {"image": "a.png", "question": "What?", "answer": "A dog."},
    "answers": {"image": "a.png", "question": "What?", "answers": ["A dog.", "dog"]},
    "xtuner": {"image": "a.png", "conversation": [{"input": "<image>What?", "output": "A dog."}]},
    "prompt and completion": {"images": ["a.png"], "prompt": [ASK], "completion": [SAY]},
    "WebDataset": {
        "__key__": "0001",
        "png": {"path": "a.png"},
        "json": {"question": "What?", "answer": "A dog.", "caption": None},
    },
}


@pytest.mark.parametrize("row", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_same_conversation(row):
    found = conversation_of(row)
    assert [image.place for image in found.images] == ["a.png"]
    roles = [(message["role"], message["content"]) for message in found.messages]
    assert roles == [
        ("user", [{"type": "image"}, {"type": "text", "text": "What?"}]),
        ("assistant", [{"type": "text", "text": "A dog."}]),
    ]


@pytest.mark.parametrize(
    "value",
    [
        DATA,
        URI,
        BASE64,
        {"bytes": DATA, "path": "a.png"},
        {"base64": BASE64},
        {"url": URI},
        {"type": "base64", "media_type": "image/png", "data": BASE64},
        Image.new("RGB", (6, 4)),
    ],
    ids=range(8),
)
def test_images_in_the_row_itself(value, tmp_path):
    for row in ({"messages": [ASK, SAY], "images": [value]}, part(type="image", source=value)):
        (image,) = conversation_of(row).images
        assert image.file(tmp_path) is None
        assert read_size(image.open(tmp_path)) == (6, 4)


def test_captions_systems_and_rows_without_images():
    captioned = conversation_of({"image": "a.png", "caption": "A dog."})
    assert [m["content"] for m in captioned.messages] == [
        [{"type": "image"}],
        [{"type": "text", "text": "A dog."}],
    ]
    plain = conversation_of({"messages": [{**ASK, "content": "Hi"}, SAY], "system": "Be kind"})
    assert [message["role"] for message in plain.messages] == ["system", "user", "assistant"]
    assert not plain.images
    assert len(conversation_of({"question": "a", "answer": "b"}).messages) == 2
    alpaca = {"image": "a.png", "instruction": "Do", "input": "it", "output": "b"}
    question = conversation_of(alpaca).messages[0]["content"]
    assert question == [{"type": "image"}, {"type": "text", "text": "Do\nit"}]


def test_images_keep_the_order_of_their_marks():
    talk = [
        {"role": "user", "content": "a <image> b <image>"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "d"}]},
        {"role": "assistant", "content": "e"},
    ]
    found = conversation_of({"messages": talk, "images": ["1.png", "2.png", "3.png"]})
    assert [image.place for image in found.images] == ["1.png", "2.png", "3.png"]
    kinds = [[part["type"] for part in message["content"]] for message in found.messages]
    assert kinds == [["text", "image", "text", "image"], ["text"], ["image", "text"], ["text"]]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [ASK, SAY]}, "1 <image> in the text, 0 images"),
        ({"messages": [ASK, SAY], "images": []}, "1 <image> in the text, 0 images"),
        ({"messages": [ASK, SAY], "images": ["a", "b"]}, "1 <image> in the text, 2 images"),
        ({"messages": [ASK, ASK, SAY], "images": ["a"]}, "2 <image> in the text, 1 images"),
        (part(type="image", image="a") | {"images": ["b"]}, "0 <image> in the text, 1 images"),
        (part(type="image", index=3) | {"images": ["b"]}, "1 <image> in the text, 1 images"),
        (part(type="video"), "1 <video> in the text, 0 videos"),
        ({"messages": [SAY], "videos": ["a.mp4"]}, "it has 1 videos and no question"),
        (part(type="video", video=Image.new("RGB", (6, 4))), "which is no video"),
        (part(type="audio", audio="a.wav"), "a part of a message is of type 'audio'"),
        ({"messages": [SAY], "images": ["a"]}, "it has 1 images and no question"),
        ({"messages": [], "images": ["a"]}, "its conversation is empty"),
        ({"messages": ["x"]}, "its messages hold 'x'"),
        ({"messages": [{"role": "robot", "content": ""}]}, "the role 'robot' is unknown"),
        ({"messages": [ASK, SAY], "images": [5]}, "its image is 5, which is no image"),
        ({"messages": [ASK, SAY], "images": [{"x": 1}]}, "which is no image"),
        ({"messages": [ASK, SAY], "images": ["data:image/png;utf8,a"]}, "is no data URI"),
        ({"messages": [ASK, SAY], "images": ["data:image/png;base64,?"]}, "is no base64"),
    ],
)
def test_rows_whose_images_do_not_fit_are_told_apart(row, said):
    with pytest.raises(BadRowError, match=re.escape(said)):
        conversation_of(row)


def test_a_function_of_the_user_makes_messages():
    def function(row):
        question = [{"type": "image", "image": row["file"]}, {"type": "text", "text": row["q"]}]
        return {"messages": [{"role": "user", "content": question}, SAY]}

    found = conversation_of({"file": "a.png", "q": "What?"}, function)
    assert found.images[0].place == "a.png"


def test_columns_of_images_are_not_decoded():
    features = Features(
        {"images": List(ImageFeature()), "image": ImageFeature(), "text": Value("string")}
    )
    stored = {"bytes": b"no image", "path": "a.png"}
    rows = Dataset.from_dict({"images": [[stored]], "image": [stored], "text": ["x"]}, features)
    assert SourceRows(rows)[[0]] == [{"images": [stored], "image": stored, "text": "x"}]


def test_web_dataset_shards(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for number in range(2):
            texts = json.dumps({"question": "What?", "answer": str(number)}).encode()
            for suffix, data in (("png", encoded(6 + number)), ("json", texts)):
                entry = tarfile.TarInfo(f"{number:04}.{suffix}")
                entry.size = len(data)
                shard.addfile(entry, io.BytesIO(data))
    rows = load_dataset("webdataset", data_files=str(tmp_path / "a.tar"), split="train")
    talks = [conversation_of(row) for row in SourceRows(rows)[[0, 1]]]
    assert [read_size(talk.images[0].open(tmp_path)) for talk in talks] == [(6, 4), (7, 4)]
    assert talks[1].messages[1]["content"] == [{"type": "text", "text": "1"}]
