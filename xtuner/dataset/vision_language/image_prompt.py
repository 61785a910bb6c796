"""A conversation with images and videos as inputs of ``generate``, made by the model's processor.

Serves chat, sample answers while training, and evaluation. Training encodes whole conversations
with their labels; the prompt of an answer is the same there, and videos are read as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.dataset.videos import Clip, FrameSampling, Visual
from xtuner.dataset.vision_language.placeholders import placeholders_of
from xtuner.dataset.vision_language.video_refs import video_ref
from xtuner.dataset.vision_language.video_texts import arguments_of
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import ProcessorMixin


def user_message(question: str, visuals: Sequence[Visual] = ()) -> dict[str, Any]:
    """A question as a message with content parts, its images and videos before its text.

    Args:
        question: the text.
        visuals: what it is about.
    """
    parts = [{"type": "video" if isinstance(each, Clip) else "image"} for each in visuals]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def text_message(role: str, text: str) -> dict[str, Any]:
    """A message of text alone; templates of these models take lists of parts."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def encode_image_prompt(
    processor: ProcessorMixin,
    messages: list[dict[str, Any]],
    visuals: Sequence[Visual],
    template_arguments: Mapping[str, Any] | None = None,
    *,
    is_answered: bool = False,
) -> dict[str, Tensor]:
    """The inputs of ``generate`` for a conversation whose last question is to be answered.

    Args:
        processor: of the model.
        messages: with content parts; ``{"type": "image"}`` is the place of an image.
        visuals: images and videos of all messages, in order.
        template_arguments: given to the chat template, such as ``enable_thinking``.
        is_answered: the conversation ends in an answer: nothing follows.

    Returns:
        ``input_ids`` and ``attention_mask`` (1, S), and what the processor makes of the images.

    Raises:
        UserError: when the processor takes no images together with videos, and both are there.
    """
    clips = [each for each in visuals if isinstance(each, Clip)]
    images = [each for each in visuals if not isinstance(each, Clip)]
    if clips and images:
        _require_both(processor)
    text = processor.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=not is_answered,
        **(template_arguments or {}),
    )
    inputs = processor(
        text=[text],
        images=[images] if images else None,
        add_special_tokens=False,  # the template writes them
        return_tensors="pt",
        **(arguments_of(clips) if clips else {}),
    )
    return dict(inputs)


def _require_both(processor: ProcessorMixin) -> None:
    if not placeholders_of(processor).can_mix:
        raise UserError(
            tr(
                "{kind} takes no images and videos in one conversation.",
                kind=type(processor).__name__,
            ),
            hint=tr("in a chat, /clear forgets those that are there."),
        )


def load_video(
    video: str | Sequence[str], processor: ProcessorMixin, sampling: FrameSampling
) -> Clip:
    """Read a video as training does.

    Args:
        video: a file, a folder of frames, an address, or a list of frames.
        processor: of the model that it is for.
        sampling: which frames are used.

    Raises:
        UserError: when the processor takes no videos, or a library is missing.
        OSError: when it cannot be read.
    """
    texts = placeholders_of(processor).videos
    texts.require()
    found = video_ref(_absolute(video) if isinstance(video, str) else list(map(_absolute, video)))
    return found.clip(Path(), found.shape(Path(), texts.sampling(sampling)))


def _absolute(place: str) -> str:
    """A path that may leave the folder where the command runs."""
    is_file = "://" not in place and not place.startswith("data:")
    return str(Path(place).expanduser().absolute()) if is_file else place
