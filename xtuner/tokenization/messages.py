"""From messages to token ids and labels by the tokenizer's own chat template.

An answer is trained as the template writes it when it is the last message, and after the very
prompt that chat and inference servers build for it (``add_generation_prompt``).

Most templates only ever append: then all answers of a conversation are in one sample. Others write
earlier messages differently once more follow: they leave out reasoning, end earlier answers with
another token, or move the system prompt and the tools. An answer that the whole conversation does
not show as it is generated becomes a sample of its own, which ends with it.
"""

from __future__ import annotations

import contextlib
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from xtuner.tokenization.content import has_loss, text_of
from xtuner.tokenization.encode import Sample
from xtuner.tokenization.offsets import Span, encode_with_offsets
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


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    tools: str | Sequence[Mapping[str, Any]] | None = None,
    train_on: str = "answers",
    thinking: str = "keep",
    template_arguments: Mapping[str, Any] | None = None,
) -> list[Sample]:
    """Tokenise one conversation with the tokenizer's own chat template.

    Args:
        messages: OpenAI messages: ``role``, ``content``, where given ``tool_calls``,
            ``reasoning_content`` and, for an answer without loss, ``loss`` false.
        tokenizer: a tokenizer with a chat template.
        tools: their JSON schemas, as a list or its text; None for none.
        train_on: ``answers``, ``last_answer`` or ``everything``.
        thinking: of ``thinking.TRAIN_THINKING``.
        template_arguments: given to the chat template, such as ``enable_thinking``.

    Returns:
        ``input_ids`` and ``labels`` of equal length; labels are ``IGNORE_INDEX`` where there is no
        loss. One sample, or several where the template rewrites earlier messages; each answer is
        trained in one of them.

    Raises:
        ValueError: when an answer has no question before it, when the template does not write it
            after the prompt for it, or leaves its reasoning out.
    """
    plain = template_messages(messages, tokenizer)
    if thinking == "drop":
        plain = [without_reasoning(m) if m["role"] == "assistant" else m for m in plain]
    render = _Renderer(tokenizer, template_tools(tools), template_arguments or {})
    if train_on == "everything":
        ids = encode_with_offsets(tokenizer, render(plain))[0]
        return [{"input_ids": ids, "labels": ids}]
    answers = [number for number, message in enumerate(plain) if message["role"] == "assistant"]
    trained = answers[-1:] if train_on == "last_answer" else answers
    trained = [number for number in trained if has_loss(messages[number])]
    if trained and all(
        message["role"] in ("system", "developer") for message in plain[: trained[0]]
    ):
        raise ValueError("the conversation begins with an answer; a question must come first")
    texts = _samples(render(plain), [_answer(plain, number, render) for number in trained])
    return [
        _encoded(text, spans, [] if thinking == "keep" else empty_blocks(text), tokenizer)
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
        if "</think>" not in str(render.tokenizer.chat_template):
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
    text: str, trained: Sequence[Span], untrained: Sequence[Span], tokenizer: Tokenizer
) -> Sample:
    """Ids and labels of a text; no token spans the start or the end of an answer."""
    ids, places = encode_with_offsets(tokenizer, text)
    bounds = sorted({0, len(text), *(bound for span in [*trained, *untrained] for bound in span)})
    if _spanned(places, {bound for span in trained for bound in span}):
        segments = list(pairwise(bounds))
        encoded = encode_segments(tokenizer, [text[start:stop] for start, stop in segments])
        ids = [number for segment in encoded for number in segment]
        places = [
            place for place, each in zip(segments, encoded, strict=True) for _ in range(len(each))
        ]
    labels = [
        token
        if any(_covers(span, place) for span in trained)
        and not any(_covers(block, place) for block in untrained)
        else IGNORE_INDEX
        for token, place in zip(ids, places, strict=True)
    ]
    return {"input_ids": ids, "labels": labels}


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


def _covers(span: Span, offsets: Span) -> bool:
    """Whether a token belongs to an answer.

    Byte-level tokenizers with ``trim_offsets`` leave whitespace out of a token's offsets; a token
    of whitespace alone then has no width and stands where it ends.
    """
    (start, stop), (first, last) = span, offsets
    return start <= first and start < last <= stop


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
    """The tokenizer's chat template, with the tools of one conversation and other arguments."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        tools: Sequence[Mapping[str, Any]] | None,
        arguments: Mapping[str, Any],
    ) -> None:
        self.tokenizer, self.tools, self.arguments = tokenizer, tools, arguments

    def __call__(self, messages: Sequence[Message], prompt: bool = False) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tools=self.tools,
                tokenize=False,
                add_generation_prompt=prompt,
                **self.arguments,
            )
        )


def template_messages(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[Message]:
    """Messages as the tokenizer's chat template expects them.

    Content is text, the arguments of calls are objects, reasoning is in the field that it reads.
    """
    template = str(tokenizer.chat_template)
    return [with_field_of(template, _plain_message(message)) for message in messages]


def template_tools(
    tools: str | Sequence[Mapping[str, Any]] | None,
) -> list[dict[str, Any]] | None:
    """Tools as chat templates expect them: a list of JSON schemas, or None."""
    return _plain(json.loads(tools) if isinstance(tools, str) else tools) or None


def _plain_message(message: Mapping[str, Any]) -> Message:
    """A message as templates expect it: content as text, the arguments of calls as objects."""
    plain: Message = _plain(message)
    plain.pop("loss", None)
    plain["content"] = text_of(plain.get("content"))
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
