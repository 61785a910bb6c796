"""From messages to token ids and labels by the tokenizer's own chat template.

The conversation is rendered once, with its tools; the answers' places in that text are found, and
what the template writes for an answer, from the end of the prompt for it to its end mark, is
trained.

Most templates only ever append: then an answer begins where the prompt for it ends. Some write
earlier answers differently once more messages follow (they leave out its reasoning). There an
answer's place is where the text changes when its content does.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from xtuner.tokenization.content import has_loss, text_of
from xtuner.tokenization.encode import Sample
from xtuner.tokenization.offsets import Span, encode_with_offsets
from xtuner.tokenization.thinking import empty_blocks, without_reasoning
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.types import Tokenizer

Message = dict[str, Any]

# Two contents whose first and last characters differ, so that one of them differs from the true
# content at either end.
_PLACEHOLDERS = ("qXj", "Zk7")


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    tools: str | Sequence[Mapping[str, Any]] | None = None,
    last_only: bool = False,
    thinking: str = "keep",
    template_arguments: Mapping[str, Any] | None = None,
) -> Sample:
    """Tokenise one conversation with the tokenizer's own chat template.

    Args:
        messages: OpenAI messages: ``role``, ``content``, where given ``tool_calls``,
            ``reasoning_content`` and, for an answer without loss, ``loss`` false.
        tokenizer: a tokenizer with a chat template.
        tools: their JSON schemas, as a list or its text; None for none.
        last_only: train the last answer alone.
        thinking: of ``thinking.TRAIN_THINKING``.
        template_arguments: given to the chat template, such as ``enable_thinking``.

    Returns:
        ``input_ids`` and ``labels`` of equal length; labels are ``IGNORE_INDEX`` where there is no
        loss.

    Raises:
        ValueError: when an answer cannot be located in the text, or has no question before it.
    """
    plain = [_plain_message(message) for message in messages]
    if thinking == "drop":
        plain = [without_reasoning(m) if m["role"] == "assistant" else m for m in plain]
    schemas = _plain(json.loads(tools) if isinstance(tools, str) else tools)
    render = _Renderer(tokenizer, schemas, template_arguments or {})
    answers = [number for number, message in enumerate(plain) if message["role"] == "assistant"]
    trained = answers[-1:] if last_only else answers
    trained = [number for number in trained if has_loss(messages[number])]
    if trained and all(
        message["role"] in ("system", "developer") for message in plain[: trained[0]]
    ):
        raise ValueError("the conversation begins with an answer; a question must come first")
    text = render(plain)
    spans = [_span(text, plain, number, render) for number in trained]
    untrained = [] if thinking == "keep" else empty_blocks(text)
    ids, places = encode_with_offsets(tokenizer, text)
    labels = [
        token
        if any(_covers(span, offsets) for span in spans)
        and not any(_covers(block, offsets) for block in untrained)
        else IGNORE_INDEX
        for token, offsets in zip(ids, places, strict=True)
    ]
    return {"input_ids": ids, "labels": labels}


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
        self.tokenizer, self.tools, self.arguments = tokenizer, tools or None, arguments

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


def _span(text: str, messages: Sequence[Message], number: int, render: _Renderer) -> Span:
    """Where, in the text of all messages, the answer is that message ``number`` holds."""
    prompt = render(messages[:number], prompt=True)
    answered = render(messages[: number + 1]).rstrip()
    if text.startswith(answered) and answered.startswith(prompt):
        return len(prompt), len(answered)
    own = render(messages[: number + 1])
    before = _common(prompt, render(messages[:number]))
    opening = own[before : before + _common(prompt[before:], own[before:])]
    first, last = _changing(text, messages, number, render)
    place = text.rfind(opening, 0, first)
    mark = own[_changing(own, messages[: number + 1], number, render)[1] :].rstrip()
    if not opening.strip() or place < 0 or not text.startswith(mark, last):
        raise ValueError(
            "the tokenizer's chat template writes an earlier answer so that its place cannot be "
            "told; give such rows one turn each, or use a named template"
        )
    return place + len(opening), last + len(mark)


def _changing(
    text: str, messages: Sequence[Message], number: int, render: _Renderer
) -> tuple[int, int]:
    """The part of a text that depends on what one of its messages says."""
    others = []
    for stand_in in _PLACEHOLDERS:
        bare = {"role": messages[number]["role"], "content": stand_in}
        others.append(render([*messages[:number], bare, *messages[number + 1 :]]))
    first = min(_common(text, other) for other in others)
    behind = min(_common(text[::-1], other[::-1]) for other in others)
    return first, max(first, len(text) - behind)


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


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
