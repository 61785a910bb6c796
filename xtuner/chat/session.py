"""A chat session: history, truncation to the context length, generation, tool calls."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import StoppingCriteriaList, TextStreamer

from xtuner.chat.prompt import ChatImage, ChatPrompt, Turn
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr
from xtuner.utils.stop_criteria import StopWordStoppingCriteria

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from xtuner.dataset.videos import Visual
    from xtuner.utils.types import Tokenizer

Say = Callable[[str], None]
MAX_TOOL_CALLS = 8
_COMMANDS = re.compile(r"<\|Commands\|>:(.*?)<eoc>", re.DOTALL)


class GenerativeModel(Protocol):
    """What a session uses of a transformers model, or of a ``VisionLanguageModel``."""

    @property
    def config(self) -> PreTrainedConfig: ...

    @property
    def device(self) -> torch.device: ...

    def generate(self, input_ids: torch.Tensor, **settings: object) -> torch.Tensor: ...


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; ``temperature=0`` is greedy decoding."""

    max_new_tokens: int = 2048
    temperature: float = 0.1
    top_k: int = 40
    top_p: float = 0.75
    repetition_penalty: float = 1.0

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of ``generate``."""
        if self.temperature <= 0:
            chosen: dict[str, Any] = {
                "do_sample": False,
                "temperature": None,
                "top_k": None,
                "top_p": None,
            }
        else:
            chosen = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_k": self.top_k,
                "top_p": self.top_p,
            }
        return chosen | {"repetition_penalty": self.repetition_penalty}


@dataclass
class ChatSession:
    """A model and its conversation.

    Attributes:
        model: a transformers model that generates.
        prompt: makes token ids of the conversation.
        system: the system prompt; empty for none.
        sampling: settings of ``generate``.
        run_tools: maps the text after ``<|Commands|>:`` to the text of the results; None for none.
        notice: called with messages for the user, such as that history was dropped.
        turns: questions and their answers, oldest first.
        images: and videos; they go with the next question.
    """

    model: GenerativeModel
    prompt: ChatPrompt
    system: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    run_tools: Callable[[str], str] | None = None
    notice: Say = print
    turns: list[Turn] = field(default_factory=list)
    images: list[ChatImage] = field(default_factory=list)

    def attach(self, image: Visual, file: str | None = None) -> None:
        """Ask the next question about this image (too).

        Args:
            image: in RGB; or a video of ``prompt.read_video``.
            file: that it was read from; ``/save`` writes it.

        Raises:
            UserError: when the model takes none.
        """
        model: Any = self.model
        if self.prompt.takes_images:
            self.images.append(ChatImage(image, file))
        elif hasattr(model, "set_image"):  # one image, before the first question
            model.set_image(image)
            self.reset()
        else:
            raise UserError(
                tr("this model takes no images."),
                hint=tr("chat with a vision-language model, such as Qwen/Qwen2.5-VL-3B-Instruct."),
            )

    def ask(self, question: str, show: Say | None = None) -> str:
        """Answer a question and add both to the history.

        Args:
            question: the user's text.
            show: called with each further part of the answer, without stop words.

        Returns:
            The full answer.

        Raises:
            UserError: when the question alone exceeds the model's context length.
        """
        images = tuple(self.images)
        self.turns.append(Turn(question, images=images))
        try:
            ids = self._fitting_ids()
            answer = self._generate(ids, show)
            for _ in range(MAX_TOOL_CALLS if self.run_tools else 0):
                calls = _COMMANDS.findall(answer.raw)
                if not calls or not answer.raw.rstrip().endswith("<eoc>"):
                    break
                answer = self._with_results(ids, answer, calls[-1], show)
        except BaseException:
            self.turns.pop()
            raise
        self.turns[-1] = Turn(question, answer.text, images)
        self.images.clear()
        return answer.text

    def undo(self) -> Turn | None:
        """Remove the last question and its answer from the history and return them."""
        return self.turns.pop() if self.turns else None

    def reset(self) -> None:
        """Clear the history, and the images of the next question."""
        self.turns.clear()
        self.images.clear()

    @property
    def context(self) -> int:
        """The model's context length in tokens."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", 0) or 10**9)

    def _fitting_ids(self) -> list[int]:
        """The prompt's ids; the oldest turns are dropped until there is room for an answer."""
        reserve = min(self.sampling.max_new_tokens, self.context // 4)
        dropped = 0
        ids = self.prompt.ids(self.turns, self.system)
        while len(ids) + reserve > self.context and dropped < len(self.turns) - 1:
            dropped += 1
            ids = self.prompt.ids(self.turns[dropped:], self.system)
        if not ids:
            raise UserError(
                tr("the chat template writes nothing for this question: the prompt is empty."),
                hint=tr("use a template of ours: --prompt-template NAME"),
            )
        if len(ids) >= self.context:
            raise UserError(
                tr(
                    "the question has {count} tokens; the model takes {context}.",
                    count=len(ids),
                    context=self.context,
                ),
                hint=tr("ask a shorter question."),
            )
        del self.turns[:dropped]
        if dropped:
            self.notice(
                tr(
                    "[the context is full: the oldest {dropped} turn(s) were dropped]",
                    dropped=dropped,
                )
            )
        return ids

    @torch.no_grad()
    def _generate(self, ids: list[int], show: Say | None) -> _Answer:
        tokenizer = self.prompt.tokenizer
        stop_ids, stop_texts = self.prompt.stops(getattr(self.model, "generation_config", None))
        streamer = _Printer(tokenizer, stop_texts, show) if show else None
        inputs = torch.tensor([ids], device=self.model.device)
        with _explained():
            output = self.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max(1, min(self.sampling.max_new_tokens, self.context - len(ids))),
                eos_token_id=stop_ids or None,
                pad_token_id=_pad_id(tokenizer, stop_ids),
                stopping_criteria=StoppingCriteriaList(
                    [StopWordStoppingCriteria(tokenizer, word) for word in stop_texts]
                ),
                streamer=streamer,
                **self._model_inputs(),
                **self.sampling.settings(),
            )
        new = output[0, len(ids) :].tolist()
        raw = tokenizer.decode(new, skip_special_tokens=False)
        while new and new[-1] in stop_ids:
            new.pop()
        text = tokenizer.decode(new, skip_special_tokens=True)
        for word in stop_texts:
            text = text.partition(word)[0]
        return _Answer(new, raw, text.strip())

    def _model_inputs(self) -> dict[str, Any]:
        """What goes with the ids, on the model's device; pixels in its dtype."""
        device, dtype = self.model.device, getattr(self.model, "dtype", torch.float32)
        return {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in self.prompt.model_inputs(self.turns, self.system).items()
        }

    def _with_results(
        self, ids: list[int], answer: _Answer, call: str, show: Say | None
    ) -> _Answer:
        """Run the model's tool calls, append the results and generate the rest of the answer."""
        assert self.run_tools is not None
        results = f"<|Results|>:\n{self.run_tools(call)}<eor>\n"
        if show:
            show(f"\n{results}")
        text = f"{answer.text}<eoc>\n{results}"
        more = self._generate(ids + self.prompt.encode(text), show)
        return _Answer(answer.ids + more.ids, more.raw, text + more.text)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Say what it means when no token can be drawn.

    Raises:
        UserError: when the model's logits are not finite.
    """
    try:
        yield
    except RuntimeError as error:
        if "`nan`" not in str(error):
            raise
        raise UserError(
            tr("the model computes numbers that are not finite."),
            hint=tr(
                "its weights are damaged, or too large for this dtype: try --torch-dtype fp32."
            ),
        ) from error


@dataclass(frozen=True)
class _Answer:
    ids: list[int]
    raw: str
    text: str


def _pad_id(tokenizer: Tokenizer, stop_ids: list[int]) -> int | None:
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return stop_ids[0] if stop_ids else None


class _Printer(TextStreamer):
    """Prints text as it is generated, except an end that may be the start of a stop word."""

    def __init__(self, tokenizer: Any, stop_texts: list[str], show: Say) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stop_texts = stop_texts
        self._show = show
        self._held = ""
        self._stopped = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by ``TextStreamer`` with each further part of the text."""
        self._held += text
        if self._stopped:
            return
        for word in self._stop_texts:
            if word in self._held:
                self._held = self._held.partition(word)[0]
                self._stopped = stream_end = True
        keep = 0 if stream_end else self._may_become_stop_word()
        ready, self._held = self._held[: len(self._held) - keep], self._held[-keep:] if keep else ""
        if ready:
            self._show(ready)

    def _may_become_stop_word(self) -> int:
        """The length of the longest end of the text that starts a stop word, in characters."""
        lengths = [
            length
            for word in self._stop_texts
            for length in range(1, len(word))
            if self._held.endswith(word[:length])
        ]
        return max(lengths, default=0)
