"""Chat with a vision-language model of transformers: images and videos go with their questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xtuner.chat.prompt import ChatPrompt, Turn
from xtuner.dataset.videos import Clip, FrameSampling
from xtuner.dataset.vision_language.image_prompt import (
    encode_image_prompt,
    load_video,
    text_message,
    user_message,
)
from xtuner.tokenization.rendering import TEMPLATE_SECONDS, time_limit
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from transformers import ProcessorMixin


@dataclass
class ImageTextPrompt(ChatPrompt):
    """Prompts made by the model's processor, with any number of images and videos at each question.

    Attributes:
        processor: of the model; its chat template is used.
        template_arguments: given to the chat template.
        frames: which frames of videos are used.
    """

    takes_images = True
    processor: ProcessorMixin | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)
    frames: FrameSampling = field(default_factory=FrameSampling)

    def read_video(self, file: str) -> Clip:
        """As ``ChatPrompt``; a video is read as in training."""
        assert self.processor is not None
        try:
            return load_video(file, self.processor, self.frames)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                tr("the video cannot be read: {error}", error=reason), where=Where(file)
            ) from error

    def ids(self, turns: Sequence[Turn], system: str = "") -> list[int]:
        """The ids of a conversation, with a token for each place of an image's features."""
        ids: list[int] = self._inputs(turns, system)["input_ids"][0].tolist()
        return ids

    def model_inputs(self, turns: Sequence[Turn], system: str = "") -> dict[str, Any]:
        """What the model takes beside ids: pixels, sizes of images, kinds of tokens."""
        inputs = self._inputs(turns, system)
        return {
            name: value
            for name, value in inputs.items()
            if name not in ("input_ids", "attention_mask")
        }

    def _inputs(self, turns: Sequence[Turn], system: str) -> dict[str, Any]:
        assert self.processor is not None
        messages = [text_message("system", system)] if system else []
        for turn in turns:
            messages.append(user_message(turn.question, [each.image for each in turn.images]))
            if turn.answer is not None:
                messages.append(text_message("assistant", turn.answer))
        images = [each.image for turn in turns for each in turn.images]
        with time_limit(TEMPLATE_SECONDS):
            return encode_image_prompt(self.processor, messages, images, self.template_arguments)
