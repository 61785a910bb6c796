"""A row of any layout with images as messages with content parts and the images in their order.

Texts mark images with ``<image>`` and videos with ``<video>``, content parts are images and videos
themselves or take the next one of the row's own. Where a row has images or videos and no place for
them, they come first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from xtuner.dataset.map_fns.auto import PAIRS, auto_map_fn, sharegpt_message
from xtuner.dataset.vision_language.image_refs import ImageRef, image_ref
from xtuner.dataset.vision_language.video_refs import FPS_KEYS, VideoRef, video_ref
from xtuner.tokenization.content import content_of, text_of
from xtuner.tokenization.messages import Message, messages_of
from xtuner.tokenization.roles import ANY
from xtuner.utils.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN
from xtuner.utils.errors import BadRowError
from xtuner.utils.lang import tr
from xtuner.utils.types import RowFunction

IMAGE_COLUMNS = ("images", "image", "img", "picture", "photo", "image_path", "image_url")
VIDEO_COLUMNS = ("videos", "video")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "mov", "avi")
"""Columns of WebDataset shards are named by the suffixes of the files."""
IMAGE_PARTS = ("image", "image_url", "input_image")
VIDEO_PARTS = ("video", "video_url", "input_video")
BARE_PARTS = ("text", "image", "video")
"""Keys that tell what a part without a type is."""
TEXT_PARTS = ("text", "input_text", "output_text")
CAPTIONS = ("caption", "text", "txt")
Kind = Literal["image", "video"]
COLUMNS: dict[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "image": (IMAGE_COLUMNS, IMAGE_SUFFIXES),
    "video": (VIDEO_COLUMNS, VIDEO_SUFFIXES),
}
MARKS: dict[str, Kind] = {DEFAULT_IMAGE_TOKEN: "image", DEFAULT_VIDEO_TOKEN: "video"}
_MARK = re.compile("|".join(map(re.escape, MARKS)))

Ref = ImageRef | VideoRef


class Place(NamedTuple):
    """An image or a video of a message.

    Attributes:
        kind: which of them.
        value: its own, the row's one of a number, or None for the row's next one.
    """

    kind: Kind
    value: int | Ref | None = None


@dataclass(frozen=True)
class Conversation:
    """A row.

    Attributes:
        messages: with content parts ``{"type": "text" | "image" | "video"}``.
        images: images and videos of all messages, in order.
        tools: their JSON schemas, as the row has them.
    """

    messages: list[Message]
    images: list[Ref]
    tools: Any = None


def conversation_of(row: Mapping[str, Any], function: RowFunction | None = None) -> Conversation:
    """The messages and images of a row.

    Args:
        row: of any layout that ``auto_map_fn`` reads, with columns of images.
        function: makes ``messages`` (or ``conversation``) of it, and may make ``images``; None
            where the layout is to be recognised.

    Raises:
        BadRowError: when the row has no layout, or its images do not fit its texts.
    """
    row = _present(row)
    row = row | _present(function(row)) if function else _without_shard_names(row)
    own: dict[Kind, list[Ref]] = {
        "image": [image_ref(v) for name in _columns(row, "image") for v in _listed(row[name])],
        "video": [video_ref(v) for name in _columns(row, "video") for v in _videos(row[name])],
    }
    places: list[Place] = []
    has_own = any(own.values())
    messages = [_with_parts(message, places) for message in messages_of_row(row, has_own)]
    kinds = {place.kind for place in places}
    for kind in ("video", "image"):  # images come first
        if own[kind] and kind not in kinds:
            _put_first(messages, kind, len(own[kind]))
            places = [Place(kind)] * len(own[kind]) + places
    return Conversation(messages, _assigned(places, own), row.get("tools"))


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def _listed(value: object) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _videos(value: object) -> list[Any]:
    """The videos of a column: a list of images is one, and has one frame for each."""
    values = _listed(value)
    is_one = bool(values) and all(map(_is_frame, values))
    return [values] if is_one else values


def _is_frame(value: object) -> bool:
    if isinstance(value, Mapping):
        value = value.get("path") or value.get("image") or value.get("url")
    if isinstance(value, str):
        return value.rpartition(".")[2].lower() in IMAGE_SUFFIXES
    return hasattr(value, "convert")  # an image of Pillow


def _columns(row: Mapping[str, Any], kind: Kind) -> Iterator[str]:
    """The columns of a row that hold images; of several names for one thing the first."""
    names, suffixes = COLUMNS[kind]
    found = next((name for name in names if name in row), None)
    if found is not None:
        yield found
        return
    yield from (name for name in row if name.rpartition(".")[2].lower() in suffixes)


def _without_shard_names(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a WebDataset shard with the fields of its JSON file as its own."""
    fields = row.get("json")
    return {**_present(fields), **row} if "__key__" in row and isinstance(fields, dict) else row


def messages_of_row(row: Mapping[str, Any], has_images: bool = False) -> list[Message]:
    """The messages of a row, their contents as the row has them.

    Args:
        row: of any layout that ``conversation_of`` reads.
        has_images: whether columns of the row hold images or videos, which a caption may be about.

    Raises:
        BadRowError: when the row has no layout, or a message no known role.
    """
    talk = _talk(row)
    if talk is None:
        texts = [name for name in CAPTIONS if isinstance(row.get(name), str)]
        if has_images and texts and not _is_dialogue(row):
            answer = {"role": "assistant", "content": row[texts[0]]}
            return [{"role": "user", "content": ""}, answer]
        made = auto_map_fn(row)
        talk = made.get("messages") or messages_of(made["conversation"])
    messages = [_message(item) for item in talk]
    if not messages:
        raise BadRowError(tr("its conversation is empty"))
    system = row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _is_dialogue(row: Mapping[str, Any]) -> bool:
    """Whether a row has a question and an answer in columns of their own."""
    pairs = (*PAIRS, ("instruction", "output"), ("input", "output"), ("text", "answer"))
    return any(ask in row and answer in row for ask, answer in pairs)


def _talk(row: Mapping[str, Any]) -> Sequence[Any] | None:
    """The list of messages in a row; None where it has other columns."""
    if isinstance(row.get("messages"), list):
        return row["messages"]
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        return [*row["prompt"], *row["completion"]]
    if isinstance(row.get("conversations"), list):
        return row["conversations"]
    if isinstance(row.get("conversation"), list):
        return messages_of(row["conversation"])
    if "text" in row and "answer" in row and "question" not in row:
        return _asked(row["text"], row["answer"])
    answers = row.get("answers")
    if "question" in row and "answer" not in row and isinstance(answers, list) and answers:
        return _asked(row["question"], answers[0])
    return None


def _asked(question: object, answer: object) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _message(item: object) -> Message:
    if not isinstance(item, Mapping):
        raise BadRowError(tr("its messages hold {item}", item=f"{item!r:.40}"))
    item = _present(item)
    if "role" not in item or ("content" not in item and "value" in item):
        return sharegpt_message(item)
    role = str(item["role"]).lower()
    if role not in ANY:
        raise BadRowError(tr("the role {role!r} is unknown", role=role))
    return {**item, "role": ANY[role]}


def _with_parts(message: Message, places: list[Place]) -> Message:
    """A message with its content as parts; the images in it are added to ``places``."""
    content = content_of(message)
    parts: list[dict[str, Any]] = []
    if not isinstance(content, list):
        parts += _split(text_of(content), places)
    for part in content if isinstance(content, list) else ():
        parts += _part(part, places)
    return {**message, "content": parts}


def _part(part: object, places: list[Place]) -> list[dict[str, Any]]:
    if isinstance(part, str):
        return _split(part, places)
    if not isinstance(part, Mapping):
        raise BadRowError(tr("a part of a message is {part}", part=f"{part!r:.40}"))
    part = _present(part)
    kind = part.get("type") or next((name for name in part if name in BARE_PARTS), None)
    if kind in TEXT_PARTS:
        return _split(text_of(part.get("text")), places)
    if kind in IMAGE_PARTS:
        places.append(Place("image", _value(part)))
        return [{"type": "image"}]
    if kind in VIDEO_PARTS:
        places.append(Place("video", _value(part, is_video=True)))
        return [{"type": "video"}]
    raise BadRowError(tr("a part of a message is of type {kind!r}", kind=kind))


def _value(part: Mapping[str, Any], is_video: bool = False) -> int | Ref | None:
    """Which image or video a part stands for."""
    own = {name: value for name, value in part.items() if name not in ("type", "text")}
    if own.keys() - {"index", "detail", *(FPS_KEYS if is_video else ())}:
        return video_ref(own) if is_video else image_ref(own)
    number = part.get("index")
    return number if isinstance(number, int) else None


def _split(text: str, places: list[Place]) -> list[dict[str, Any]]:
    """The parts of a text in which images are marked."""
    parts: list[dict[str, Any]] = []
    marks = _MARK.findall(text)
    for number, piece in enumerate(_MARK.split(text)):
        if number:
            kind = MARKS[marks[number - 1]]
            places.append(Place(kind))
            parts.append({"type": kind})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _put_first(messages: Sequence[Message], kind: Kind, count: int) -> None:
    """Put the images of a row that does not say where they belong before the first question."""
    asked = next((message for message in messages if message["role"] == "user"), None)
    if asked is None and kind == "image":
        raise BadRowError(tr("it has {count} images and no question", count=count))
    if asked is None:
        raise BadRowError(tr("it has {count} videos and no question", count=count))
    asked["content"] = [{"type": kind}] * count + asked["content"]


def _assigned(places: Sequence[Place], own: Mapping[Kind, Sequence[Ref]]) -> list[Ref]:
    """The images and videos in order.

    Raises:
        BadRowError: when there are more or fewer than places for them.
    """
    following = {kind: iter(refs) for kind, refs in own.items()}
    found: list[Ref | None] = []
    for kind, value in places:
        if isinstance(value, ImageRef | VideoRef):
            found.append(value)
        elif value is None:
            found.append(next(following[kind], None))
        else:
            found.append(own[kind][value] if 0 <= value < len(own[kind]) else None)
    for kind, refs in own.items():
        marked = [place.value for place in places if place.kind == kind]
        marked = [value for value in marked if not isinstance(value, ImageRef | VideoRef)]
        missing = any(
            ref is None for ref, place in zip(found, places, strict=True) if place.kind == kind
        )
        is_numbered = any(isinstance(value, int) for value in marked)
        if missing or (not is_numbered and len(marked) != len(refs)):
            raise _mismatch(kind, len(marked), len(refs))
    return [ref for ref in found if ref is not None]


def _mismatch(kind: Kind, marks: int, count: int) -> BadRowError:
    if kind == "image":
        return BadRowError(
            tr("{marks} <image> in the text, {count} images", marks=marks, count=count)
        )
    return BadRowError(tr("{marks} <video> in the text, {count} videos", marks=marks, count=count))
