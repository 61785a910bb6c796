"""What ``copy-cfg --data`` finds out about rows with images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xtuner.configs.custom import Rows
from xtuner.dataset.vision_language.content_parts import Conversation, conversation_of
from xtuner.dataset.vision_language.image_refs import ImageRef
from xtuner.dataset.vision_language.pairs import PairSide
from xtuner.dataset.vision_language.video_refs import VideoRef
from xtuner.utils.constants import PREFERENCE_SIDES
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

QUESTIONS = 2
TOKENS_AN_IMAGE = 300
"""About; of a photograph scaled down to a million pixels."""
TOKENS_A_VIDEO = 8 * TOKENS_AN_IMAGE
"""About; of 16 frames."""
CHARACTERS_A_TOKEN = 3
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError)


def has_images(row: object, side: str = "") -> bool:
    """Whether a row is a conversation about images.

    Args:
        row: of the data.
        side: of a pair of answers the one that ends the conversation, ``chosen`` or ``rejected``.
    """
    if not isinstance(row, Mapping):
        return False
    try:
        return bool(conversation_of(row, PairSide(side) if side else None).images)
    except UNREADABLE:
        return False


def image_rows(files: Sequence[str], rows: Sequence[Any], pairs: bool = False) -> Rows:
    """What is known of rows with images.

    Args:
        files: that they are from.
        rows: with ``value``, ``file`` and ``line``.
        pairs: whether a row is a pair of answers.

    Raises:
        UserError: for a row that cannot be read, with its place.
    """
    talks = []
    ends = [PairSide(side) for side in PREFERENCE_SIDES] if pairs else [None]
    for row in rows:
        try:
            talk, *_ = [conversation_of(row.value, end) for end in ends]
            talks.append(talk)
        except UNREADABLE as error:
            raise UserError(
                tr("no known layout fits this row: {error}", error=error),
                hint=tr("docs/en/vision_language.md shows the layouts of rows with images."),
                where=Where(row.file, row.line),
            ) from error
    tokens = sum(
        TOKENS_A_VIDEO if isinstance(image, VideoRef) else TOKENS_AN_IMAGE
        for talk in talks
        for image in talk.images
    )
    characters = sum(len(_text(message)) for talk in talks for message in talk.messages)
    folder = _image_folder(talks, Path(files[0]).resolve().parent)
    asked = [talk for talk in talks if _can_be_asked(talk)][:QUESTIONS]
    seen = [_places(talk.images[0], folder) for talk in asked]
    are_videos = [isinstance(talk.images[0], VideoRef) for talk in asked]
    return Rows(
        tuple(str(Path(file).resolve()) for file in files),
        len(rows),
        characters + tokens * CHARACTERS_A_TOKEN,
        None,
        questions=tuple(_question(talk) for talk in asked),
        image_folder=str(folder),
        images=tuple(
            None if is_video else places[0]
            for places, is_video in zip(seen, are_videos, strict=True)
        ),
        videos=tuple(
            (places if len(places) > 1 else places[0]) if is_video else None
            for places, is_video in zip(seen, are_videos, strict=True)
        ),
        pairs=pairs,
    )


def _can_be_asked(talk: Conversation) -> bool:
    """Whether it has one image or video, which is a file or at an address."""
    return len(talk.images) == 1 and all(_places(talk.images[0], Path()))


def _places(ref: ImageRef | VideoRef, folder: Path) -> tuple[str, ...]:
    """Where an image, a video or its frames are; empty texts for those in memory."""
    frames = ref.frames if isinstance(ref, VideoRef) else ()
    places = [frame.place for frame in frames] or [ref.place]
    return tuple(place if "://" in place or not place else str(folder / place) for place in places)


def _image_folder(talks: Sequence[Conversation], folder: Path) -> Path:
    """What the paths of images are relative to: the folder of the rows, or the one here."""
    places = [image.place for talk in talks for image in talk.images if image.place]
    local = [place for place in places if "://" not in place][:1]
    here = Path.cwd()
    if any((here / place).is_file() and not (folder / place).is_file() for place in local):
        return here
    return folder


def _question(talk: Conversation) -> str:
    asked = next(message for message in talk.messages if message["role"] == "user")
    return _text(asked).strip()


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)
