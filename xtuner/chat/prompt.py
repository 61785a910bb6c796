"""A conversation as the token ids of the model's prompt, tokenised in segments as in training.

With a published template each question, with its surrounding text, and each answer is tokenised
separately as the continuation of the text before it (see ``tokenization/segments.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from xtuner.tokenization.chat_template import answer_stops, render_question
from xtuner.tokenization.rendering import rendered
from xtuner.tokenization.segments import bos_and_eos, encode_segments
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from xtuner.dataset.videos import Clip, Visual
    from xtuner.utils.types import Tokenizer


@dataclass(frozen=True)
class ChatImage:
    """An image or a video in a conversation, and the file that it was read from, if any."""

    image: Visual
    file: str | None = None


@dataclass(frozen=True)
class Turn:
    """A question with its images and videos, and its answer, None before it is generated."""

    question: str
    answer: str | None = None
    images: tuple[ChatImage, ...] = ()


@dataclass
class ChatPrompt:
    """Builds prompts for one tokenizer.

    Attributes:
        tokenizer: of the model.
        template: an entry of ``PROMPT_TEMPLATE``; None for the tokenizer's own chat template, or
            the plain text when it has none either.
        extra_stop_words: further texts to stop at.
    """

    takes_images: ClassVar[bool] = False
    """Whether questions may have images."""

    tokenizer: Tokenizer
    template: Mapping[str, Any] | None = None
    extra_stop_words: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """``template``, ``tokenizer`` or ``raw``."""
        if self.template is not None:
            return "template"
        return "tokenizer" if self.tokenizer.chat_template else "raw"

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def ids(self, turns: Sequence[Turn], system: str = "") -> list[int]:
        """The ids of a conversation whose last question is to be answered."""
        if self.template is not None:
            segments = encode_segments(self.tokenizer, self.segments(turns, system))
            return [number for segment in segments for number in segment]
        if self.tokenizer.chat_template:
            messages = to_messages(turns, system)
            return self.encode(rendered(self.tokenizer, messages, add_generation_prompt=True))
        texts = [part for turn in turns for part in (turn.question, turn.answer) if part]
        return list(self.tokenizer.encode("\n".join([system, *texts] if system else texts)))

    def model_inputs(self, turns: Sequence[Turn], system: str = "") -> dict[str, Any]:
        """What the model takes beside the ids of a conversation."""
        return {}

    def read_video(self, file: str) -> Clip:
        """Read a video for the next question.

        Args:
            file: a file, a folder of frames, or an address.

        Raises:
            UserError: when the model takes no videos, or this one cannot be read.
        """
        raise UserError(
            tr("this model takes no videos."),
            hint=tr("chat with a vision-language model, such as Qwen/Qwen2.5-VL-3B-Instruct."),
        )

    def stops(
        self, generation_config: GenerationConfig | None = None
    ) -> tuple[list[int], list[str]]:
        """The stop ids of an answer, and the stop texts that are not a single token.

        Args:
            generation_config: of the model.
        """
        extra = self.extra_stop_words
        return answer_stops(self.tokenizer, self.template, generation_config, extra)

    def answer_end(self) -> int | None:
        """The id that ends an answer in training: eos, or the last id of the suffix."""
        assert self.template is not None
        if not self.template.get("SUFFIX_AS_EOS", False):
            eos = self.tokenizer.eos_token_id
            return None if eos is None else int(eos)
        return self.encode("." + self.template["SUFFIX"])[-1]

    def segments(self, turns: Sequence[Turn], system: str = "") -> list[str]:
        """The text of the template, in the segments that training tokenises separately."""
        assert self.template is not None
        template = self.template
        ends_in_eos = not template.get("SUFFIX_AS_EOS", False)
        bos, eos = bos_and_eos(self.tokenizer)
        segments: list[str] = []
        for number, turn in enumerate(turns):
            first = number == 0
            segments.append(bos if first or ends_in_eos else "")
            segments.append(
                render_question(template, turn.question, number + 1, system if first else "")
            )
            if turn.answer is not None:
                segments.append(turn.answer + template.get("SUFFIX", ""))
                segments.append(eos if ends_in_eos else "")
                segments.append(template.get("SEP", ""))
        return segments


def to_messages(turns: Sequence[Turn], system: str = "") -> list[dict[str, str]]:
    """The conversation as messages with roles."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": turn.answer})
    return messages
