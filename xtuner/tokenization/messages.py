"""From messages to token ids and labels by the tokenizer's own chat template.

An answer is trained as the template writes it when it is the last message, and after the very
prompt that chat and inference servers build for it (``add_generation_prompt``).

Most templates only ever append: then all answers of a conversation are in one sample. Others write
earlier messages differently once more follow: they leave out reasoning, end earlier answers with
another token, or move the system prompt and the tools. An answer that the whole conversation does
not show as it is generated becomes a sample of its own, which ends with it.

With a processor, messages have content parts: texts, and images and videos, which the template
writes as one placeholder each. The placeholders are expanded after the answers are found, and never
trained.
"""

from __future__ import annotations

import contextlib
import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from xtuner.tokenization.content import content_of, has_loss, merged_parts, text_of
from xtuner.tokenization.encode import Sample
from xtuner.tokenization.offsets import Span, encode_with_offsets
from xtuner.tokenization.rendering import ChatTemplate, rendered
from xtuner.tokenization.segments import encode_segments
from xtuner.tokenization.thinking import (
    after_block,
    empty_blocks,
    open_block,
    reasoning_of,
    with_field_of,
    without_reasoning,
)
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.types import Tokenizer

Message = dict[str, Any]


@dataclass(frozen=True)
class Placeholder:
    """What stands for an image or a video in a rendered text, and what it becomes.

    Attributes:
        span: where it is.
        text: what it becomes, each run of one repeated token as one of it.
        runs: the lengths of these runs.
        repeated: the id of that token.
    """

    span: Span
    text: str
    runs: Sequence[int] = ()
    repeated: int = -1


Expand = Callable[[str], Sequence[Placeholder]]
"""Finds the placeholders in a rendered text, in order."""


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    tools: str | Sequence[Mapping[str, Any]] | None = None,
    train_on: str = "answers",
    thinking: str = "keep",
    template_arguments: Mapping[str, Any] | None = None,
    processor: ChatTemplate | None = None,
    expand: Expand | None = None,
) -> list[Sample]:
    """Tokenise one conversation with the tokenizer's own chat template.

    Args:
        messages: OpenAI messages: ``role``, ``content``, where given ``tool_calls``,
            ``reasoning_content`` and, for an answer without loss, ``loss`` false.
        tokenizer: a tokenizer with a chat template.
        tools: their JSON schemas, as a list or its text; None for none.
        train_on: ``answers``, ``last_answer`` or ``everything``.
        thinking: of ``dataset_settings.TRAIN_THINKING``.
        template_arguments: given to the chat template, such as ``enable_thinking``.
        processor: renders the messages in place of the tokenizer; contents are lists of parts.
        expand: called with the text of each sample, one after the other.

    Returns:
        ``input_ids`` and ``labels`` of equal length; labels are ``IGNORE_INDEX`` where there is no
        loss. One sample, or several where the template rewrites earlier messages; each answer is
        trained in one of them.

    Raises:
        ValueError: when an answer has no question before it, when the template does not write it
            after the prompt for it, or leaves its reasoning out.
    """
    template = processor or tokenizer
    plain = template_messages(messages, template, parts=processor is not None)
    if thinking == "drop":
        plain = [without_reasoning(m) if m["role"] == "assistant" else m for m in plain]
    render = _Renderer(template, template_tools(tools), template_arguments or {})
    if train_on == "everything":
        text = render(plain)
        placeholders = expand(text) if expand else []
        text, _, untrained = _expanded(text, placeholders, [], [])
        ids, places = encode_with_offsets(tokenizer, text)
        return [_sample(ids, ~_covered(untrained, places), placeholders)]
    answers = [number for number, message in enumerate(plain) if message["role"] == "assistant"]
    trained = answers[-1:] if train_on == "last_answer" else answers
    trained = [number for number in trained if has_loss(messages[number])]
    if trained and all(
        message["role"] in ("system", "developer") for message in plain[: trained[0]]
    ):
        raise ValueError("the conversation begins with an answer; a question must come first")
    texts = _samples(render(plain), [_answer(plain, number, render) for number in trained])
    return [
        _encoded(text, spans, [] if thinking == "keep" else empty_blocks(text), tokenizer, expand)
        for text, spans in texts
    ]


@dataclass(frozen=True)
class _Answer:
    """An answer as it is generated: the text after the prompt, up to its end mark."""

    prompt: str
    text: str

    def span_in(self, text: str) -> Span | None:
        """Where a text has the answer after its prompt, with or without an empty think block."""
        if not text.startswith(self.prompt):
            return None
        start = len(self.prompt)
        for written in (self.text, after_block(self.text, empty=True)):
            if text.startswith(written, start):
                return start, start + len(written)
        return None


def _answer(messages: Sequence[Message], number: int, render: _Renderer) -> _Answer:
    """What is generated for message ``number``.

    Raises:
        ValueError: when the template does not write it after its prompt, or without its reasoning.
    """
    prompt = render(messages[:number], prompt=True)
    whole = render(messages[: number + 1]).rstrip()
    reasoning = reasoning_of(messages[number])
    start, is_closed = open_block(prompt)
    heads = [prompt[:start], prompt[:start].rstrip()] if start < len(prompt) else []
    head = next((head for head in heads if whole.startswith(head)), None)
    if whole.startswith(prompt):
        text = whole[len(prompt) :]
    elif head is not None:
        # the prompt ends with a think block that the template does not write before an answer
        text = after_block(whole[len(head) :])
        text = text if is_closed else f"{reasoning}\n</think>\n\n{text}"
    else:
        raise ValueError(
            "the tokenizer's chat template does not write the answer after the prompt that it "
            "gives for it; use a named template"
        )
    if reasoning and reasoning not in text and not is_closed:
        if "</think>" not in str(render.template.chat_template):
            raise ValueError(
                "the tokenizer's chat template has no place for reasoning; "
                "train_thinking='drop' leaves it out"
            )
        text = f"<think>\n{reasoning}\n</think>\n\n{after_block(text, empty=True)}"
    return _Answer(prompt, text)


def _samples(whole: str, answers: Sequence[_Answer]) -> list[tuple[str, list[Span]]]:
    """As few texts as have all answers after their prompts, each with the places of its answers."""
    samples: list[tuple[str, list[Span]]] = []
    waiting = list(answers)
    text = whole
    while waiting:
        if waiting[-1].span_in(text) is None or samples:
            text = waiting[-1].prompt + waiting[-1].text
        places = [answer.span_in(text) for answer in waiting]
        samples.append((text, [place for place in places if place]))
        waiting = [answer for answer, place in zip(waiting, places, strict=True) if not place]
    return samples[::-1] or [(whole, [])]


def _encoded(
    text: str,
    trained: Sequence[Span],
    untrained: Sequence[Span],
    tokenizer: Tokenizer,
    expand: Expand | None,
) -> Sample:
    """Ids and labels of a text; no token spans the start or the end of an answer."""
    placeholders = expand(text) if expand else []
    if placeholders:
        text, trained, untrained = _expanded(text, placeholders, trained, untrained)
    ids, places = encode_with_offsets(tokenizer, text)
    bounds = sorted({0, len(text), *(bound for span in [*trained, *untrained] for bound in span)})
    if _spanned(places, {bound for span in trained for bound in span}):
        segments = list(pairwise(bounds))
        encoded = encode_segments(tokenizer, [text[start:stop] for start, stop in segments])
        ids = [number for segment in encoded for number in segment]
        places = [
            place for place, each in zip(segments, encoded, strict=True) for _ in range(len(each))
        ]
    with_loss = _covered(trained, places) & ~_covered(untrained, places)
    return _sample(ids, with_loss, placeholders)


def _sample(
    ids: list[int], with_loss: npt.NDArray[np.bool_], placeholders: Sequence[Placeholder]
) -> Sample:
    """Ids and labels, with the repeated tokens of placeholders as often as they are repeated."""
    labels: list[int] = np.where(with_loss, ids, IGNORE_INDEX).tolist()
    runs = [length for placeholder in placeholders for length in placeholder.runs]
    if not runs:
        return {"input_ids": ids, "labels": labels}
    counts = np.ones(len(ids), dtype=np.int64)
    repeated = np.isin(ids, [placeholder.repeated for placeholder in placeholders])
    if repeated.sum() != len(runs):
        raise ValueError("there is a token of an image in the text where no image is")
    counts[repeated] = runs
    return {
        name: np.repeat(each, counts).tolist()
        for name, each in (("input_ids", ids), ("labels", labels))
    }


def _expanded(
    text: str,
    placeholders: Sequence[Placeholder],
    trained: Sequence[Span],
    untrained: Sequence[Span],
) -> tuple[str, list[Span], list[Span]]:
    """The text with its placeholders expanded, and the spans in it; placeholders are untrained."""
    pieces: list[str] = []
    expanded: list[Span] = []
    grown = [0]
    end, size = 0, 0
    for placeholder in placeholders:
        start, stop = placeholder.span
        pieces += [text[end:start], placeholder.text]
        size += start - end + len(placeholder.text)
        expanded.append((size - len(placeholder.text), size))
        end = stop
        grown.append(size - end)
    starts = [placeholder.span[0] for placeholder in placeholders]

    def moved(span: Span) -> Span:
        start, stop = (place + grown[bisect_left(starts, place)] for place in span)
        return start, stop

    own = [moved(span) for span in trained]
    return "".join([*pieces, text[end:]]), own, [*map(moved, untrained), *expanded]


def _spanned(places: Sequence[Span], bounds: set[int]) -> bool:
    """Whether a token has characters on both sides of a bound.

    Whitespace between the places of two tokens is the second one's: tokenizers with
    ``trim_offsets`` leave it out.
    """
    starts = [first for first, _ in places]
    for bound in bounds:
        following = bisect_left(starts, bound)
        end = places[following - 1][1] if following else 0
        if end > bound or (end < bound and following < len(places)):
            return True
    return False


def _covered(spans: Sequence[Span], places: Sequence[Span]) -> npt.NDArray[np.bool_]:
    """Which tokens belong to one of the spans.

    Byte-level tokenizers with ``trim_offsets`` leave whitespace out of a token's offsets; a token
    of whitespace alone then has no width and stands where it ends.
    """
    first, last = np.array(places, dtype=np.int64).reshape(-1, 2).T
    covered = np.zeros(len(first), dtype=bool)
    for start, stop in spans:
        covered |= (start <= first) & (start < last) & (last <= stop)
    return covered


def messages_of(conversation: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Turns, as map functions make them, as messages."""
    messages: list[Message] = []
    for turn in conversation:
        if turn.get("system"):
            messages.append({"role": "system", "content": str(turn["system"])})
        messages.append({"role": "user", "content": text_of(turn["input"])})
        loss = turn.get("output_with_loss")
        messages.append({"role": "assistant", "content": text_of(turn["output"]), "loss": loss})
    return messages


class _Renderer:
    """A chat template, with the tools of one conversation and other arguments.

    The first rendering of a template has limits, the others need no time for them.
    """

    known: ClassVar[set[str]] = set()
    """Templates that have rendered something."""

    def __init__(
        self,
        template: ChatTemplate,
        tools: Sequence[Mapping[str, Any]] | None,
        arguments: Mapping[str, Any],
    ) -> None:
        self.template, self.tools, self.arguments = template, tools, arguments

    def __call__(self, messages: Sequence[Message], prompt: bool = False) -> str:
        settings = {"tools": self.tools, "add_generation_prompt": prompt, **self.arguments}
        text = str(self.template.chat_template)
        if text in self.known:
            return str(self.template.apply_chat_template(messages, tokenize=False, **settings))
        first = rendered(self.template, messages, **settings)
        self.known.add(text)
        return first


def template_messages(
    messages: Sequence[Mapping[str, Any]], template: ChatTemplate, parts: bool = False
) -> list[Message]:
    """Messages as a chat template expects them.

    The arguments of calls are objects, reasoning is in the field that the template reads.

    Args:
        messages: OpenAI messages.
        template: of a tokenizer, or of a processor.
        parts: content is a list of parts, else it is text.
    """
    text = str(template.chat_template)
    return [with_field_of(text, _plain_message(message, parts)) for message in messages]


def template_tools(
    tools: str | Sequence[Mapping[str, Any]] | None,
) -> list[dict[str, Any]] | None:
    """Tools as chat templates expect them: a list of JSON schemas, or None."""
    return _plain(json.loads(tools) if isinstance(tools, str) else tools) or None


def _plain_message(message: Mapping[str, Any], parts: bool) -> Message:
    """A message as templates expect it: content as text or parts, calls' arguments as objects."""
    plain: Message = _plain(message)
    plain.pop("loss", None)
    content = content_of(plain)
    plain["content"] = merged_parts(content) if parts else text_of(content)
    for call in plain.get("tool_calls") or ():
        function = call.get("function", call)
        arguments = function.setdefault("arguments", {})
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):  # if it is no JSON, the template gets the text
                function["arguments"] = json.loads(arguments)
    return plain


def _plain(value: object) -> Any:
    """A value without the fields that Arrow fills with None."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
