"""Whether training and serving agree on a tokenizer's own chat template, by trying conversations.

Training encodes messages with ``encode_messages``; servers and chat render the messages before an
answer with ``add_generation_prompt``. For each answer the ids before its loss must be those of the
prompt, and its last id must be one at which generation stops.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from xtuner.tokenization.chat_template import set_arguments
from xtuner.tokenization.content import has_loss
from xtuner.tokenization.encode import Sample
from xtuner.tokenization.messages import (
    Message,
    encode_messages,
    template_messages,
    template_tools,
)
from xtuner.tokenization.rendering import rendered
from xtuner.tokenization.thinking import open_block, without_reasoning
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.lang import N_, tr, translate
from xtuner.utils.types import Tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add_numbers",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
                "required": ["a", "b"],
            },
        },
    }
]
"""What the probes with tools declare."""

WINDOW = 60
"""Characters of the texts that are shown around a difference."""


@dataclass(frozen=True)
class Probe:
    """A conversation to try.

    Attributes:
        feature: what it needs of the template; an empty text for what every template has.
        messages: OpenAI messages.
        shown: texts that the rendered conversation has where the template supports the feature.
        tools: JSON schemas.
        place: the row of the user's data that it is, if it is one.
    """

    feature: str
    messages: Sequence[Mapping[str, Any]]
    shown: Sequence[str] = ()
    tools: str | Sequence[Mapping[str, Any]] | None = None
    place: str = ""


@dataclass(frozen=True)
class Difference:
    """An answer that training and serving do not treat alike.

    Attributes:
        what: what disagrees.
        probe: the conversation.
        arguments: what was given to the chat template.
        trained: the text of training, around the first difference.
        served: that of serving.
        harmless: the same text, where an earlier answer is cut into other tokens.
    """

    what: str
    probe: Probe
    arguments: Mapping[str, Any] = field(default_factory=dict)
    trained: str = ""
    served: str = ""
    harmless: bool = False

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        name = self.probe.place or translate(self.probe.feature) or tr("plain conversation")
        lines = [f"{name} ({given}): {self.what}" if given else f"{name}: {self.what}"]
        if self.trained or self.served:
            lines += [tr("training: {expected}", expected=repr(self.trained))]
            lines += [tr("serving:  {found}", found=repr(self.served))]
        return "\n    ".join(lines)


@dataclass
class Checked:
    """What trying a template showed.

    Attributes:
        count: conversations, each time with other arguments, in which training and serving agree.
        supported: the features that the template has.
        unsupported: those that it does not have, with the reason if it gives one.
        differences: where training and serving disagree.
    """

    count: int = 0
    supported: list[str] = field(default_factory=list)
    unsupported: dict[str, str] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)


def _says(role: str, content: str, **fields: object) -> Message:
    return {"role": role, "content": content, **fields}


def _calls(*arguments: Mapping[str, Any], content: str = "", **fields: object) -> Message:
    calls = [
        {
            "type": "function",
            "id": f"call{number:05d}",
            "function": {"name": "add_numbers", "arguments": dict(each)},
        }
        for number, each in enumerate(arguments)
    ]
    return _says("assistant", content, tool_calls=calls, **fields)


def _result(text: str, number: int = 0) -> Message:
    return _says("tool", text, name="add_numbers", tool_call_id=f"call{number:05d}")


SYSTEM = _says("system", "You are kind.")
ASKED = _says("user", "What is their sum?")
PLAIN = [
    _says("user", "Who are you? \N{WAVING HAND SIGN}"),
    _says("assistant", "I am a small assistant."),
    _says("user", "def add(a, b):"),
    _says("assistant", "    return a + b\n\nprint(add(1, 2))"),
    _says("user", "{system} {{x}}"),
    _says("assistant", '{"a": [1, 2]}'),
]
ONE_CALL = [
    ASKED,
    _calls({"a": 1723, "b": 29}),
    _result("1752"),
    _says("assistant", "It is found."),
]
TWO_CALLS = [
    _says("user", "What are both sums?"),
    _calls({"a": 1723, "b": 29}, {"a": 40, "b": 581}),
    _result("1752"),
    _result("621", 1),
    _says("assistant", "These two."),
]
IN_TURN = [
    *ONE_CALL[:3],
    _calls({"a": 1752, "b": 581}, content="Now the next one."),
    _result("2333", 1),
    _says("assistant", "Here it is."),
    _says("user", "Thanks"),
    _says("assistant", "You are welcome."),
]
THOUGHT = "First the question.\n\nThen the answer."
THINKS = [ASKED, _says("assistant", "It is found.", reasoning_content=THOUGHT)]
ROUNDS = [*THINKS, _says("user", "Sure?"), _says("assistant", "Yes.", reasoning_content="A sum.")]
THINKS_AND_CALLS = [
    ASKED,
    _calls({"a": 1723, "b": 29}, reasoning_content="There is a tool."),
    _result("1752"),
    _says("assistant", "It is found.", reasoning_content=THOUGHT),
]

PLAIN_PROBES = [
    Probe("", PLAIN[:2]),
    Probe("", PLAIN),
    Probe(N_("a system prompt"), [SYSTEM, *PLAIN], ["You are kind."]),
]
PROBES = [
    *PLAIN_PROBES,
    Probe(N_("tools"), PLAIN, ["Add two numbers."], TOOLS),
    Probe(N_("a tool call"), ONE_CALL, ["1723", "1752"], TOOLS),
    Probe(N_("several calls in one answer"), TWO_CALLS, ["1723", "581", "1752", "621"], TOOLS),
    Probe(N_("calls one after the other"), [SYSTEM, *IN_TURN], ["581", "2333"], TOOLS),
    Probe(N_("reasoning"), THINKS, [THOUGHT]),
    Probe(N_("reasoning in several rounds"), [SYSTEM, *ROUNDS], ["A sum."]),
    Probe(N_("reasoning and tool calls"), THINKS_AND_CALLS, ["1723", "There is a tool."], TOOLS),
]
"""What is tried of every template."""

SWITCH = "enable_thinking"


def check_own_template(
    tokenizer: Tokenizer,
    stops: Sequence[int],
    probes: Sequence[Probe] = PROBES,
    *,
    arguments: Mapping[str, Any] | None = None,
    thinking: str = "keep",
) -> Checked:
    """Encode conversations as training does, and compare their prompts with those of serving.

    Args:
        tokenizer: with a chat template.
        stops: the ids at which generation stops.
        probes: what to try; with each value of ``enable_thinking``, if the template knows it.
        arguments: the ``template_arguments`` of the training.
        thinking: of ``dataset_settings.TRAIN_THINKING``.
    """
    checked = Checked()
    for given in _arguments(tokenizer, probes[0], dict(arguments or {}), checked):
        served = copy.copy(tokenizer)
        set_arguments(served, given)
        for probe in probes:
            reason = _missing(probe, served)
            if reason is not None and not probe.place:
                checked.unsupported.setdefault(probe.feature, reason)
                continue
            if probe.feature and probe.feature not in checked.supported:
                checked.supported.append(probe.feature)
            found = list(_differences(probe, tokenizer, served, given, stops, thinking))
            known = {(one.what, one.trained, one.served) for one in checked.differences}
            checked.differences += [
                one for one in found if (one.what, one.trained, one.served) not in known
            ]
            checked.count += all(each.harmless for each in found)
    for feature in checked.supported:
        checked.unsupported.pop(feature, None)
    return checked


def _arguments(
    tokenizer: Tokenizer, probe: Probe, given: dict[str, Any], checked: Checked
) -> list[dict[str, Any]]:
    """The arguments of the training, and the others that a caller of the template may give."""
    tried: list[dict[str, Any]] = [{**given, SWITCH: value} for value in (True, False)]
    prompts = {_prompt(tokenizer, probe.messages[:1], None, each) for each in (given, *tried)}
    if len(prompts) == 1:
        checked.unsupported[SWITCH] = ""
        return [given]
    checked.supported.append(SWITCH)
    return [given, *(each for each in tried if each != given)]


def _prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: object,
    arguments: Mapping[str, Any],
) -> str:
    return rendered(tokenizer, messages, tools=tools, add_generation_prompt=True, **arguments)


def _missing(probe: Probe, tokenizer: Tokenizer) -> str | None:
    """Why the template cannot show a conversation; None where it can."""
    messages = template_messages(probe.messages, tokenizer)
    try:
        text = rendered(tokenizer, messages, tools=probe.tools)
    except Exception as error:  # templates refuse with any error
        return str(error).strip() if probe.feature else None
    if all(part in text for part in probe.shown):
        return None
    try:  # training adds reasoning that a template cuts off
        samples = encode_messages(probe.messages, tokenizer, tools=probe.tools)
    except ValueError:
        return ""
    text = "".join(str(tokenizer.decode(sample["input_ids"])) for sample in samples)
    return None if all(part in text for part in probe.shown) else ""


def _differences(
    probe: Probe,
    tokenizer: Tokenizer,
    served: Tokenizer,
    arguments: Mapping[str, Any],
    stops: Sequence[int],
    thinking: str,
) -> Iterator[Difference]:
    messages = template_messages(probe.messages, tokenizer)
    if thinking == "drop":
        messages = [without_reasoning(message) for message in messages]
    try:
        samples = encode_messages(
            probe.messages,
            tokenizer,
            tools=probe.tools,
            thinking=thinking,
            template_arguments=arguments,
        )
        prompts = [
            _prompt(served, messages[:number], template_tools(probe.tools), {})
            for number, message in enumerate(probe.messages)
            if message["role"] == "assistant" and has_loss(message)
        ]
    except Exception as error:  # templates refuse with any error
        yield Difference(str(error), probe, arguments)
        return
    answers = list(_answers(samples))
    expected = [served.encode(prompt, add_special_tokens=False) for prompt in prompts]
    if len(answers) != len(prompts):
        what = tr(
            "{trained} of {count} answers are trained", trained=len(answers), count=len(prompts)
        )
        yield Difference(what, probe, arguments)
        return
    trained = [before for before, _ in answers]
    others = [number for number, prompt in enumerate(expected) if prompt not in trained]
    for before, last in answers:
        if before not in expected and others:
            number = others.pop(0)
            shown = _compared(before, expected[number], served, number > 0, thinking)
            if shown is not None:
                yield Difference(shown[0], probe, arguments, *shown[1:])
        if last not in stops:
            yield Difference(
                tr(
                    "answers end with {end!r} ({last}) in training, at which generation "
                    "does not stop (it stops at {stops})",
                    end=served.decode([last]),
                    last=last,
                    stops=list(stops),
                ),
                probe,
                arguments,
            )


def _answers(samples: Sequence[Sample]) -> Iterator[tuple[list[int], int]]:
    """The ids before each trained stretch, and its last id."""
    for sample in samples:
        ids = sample["input_ids"]
        is_trained = [False, *(label != IGNORE_INDEX for label in sample["labels"]), False]
        changes = [n for n, (one, other) in enumerate(pairwise(is_trained)) if one != other]
        bounds = zip(changes[::2], changes[1::2], strict=True)
        yield from ((ids[:start], ids[end - 1]) for start, end in bounds)


def _compared(
    before: list[int], expected: list[int], tokenizer: Tokenizer, has_history: bool, thinking: str
) -> tuple[str, str, str, bool] | None:
    """What differs between the ids before an answer's loss and its prompt.

    Returns:
        Words for it, the two texts around it, whether they are the same text after an earlier
        answer; None where the difference is an empty block without loss, as ``thinking`` says.
    """
    trained, served = str(tokenizer.decode(before)), str(tokenizer.decode(expected))
    if thinking != "keep" and _before_block(trained) == _before_block(served):
        return None
    pairs = enumerate(zip(trained, served, strict=False))
    place = next((i for i, (one, other) in pairs if one != other), min(len(trained), len(served)))
    shown = slice(max(0, place - WINDOW), place + WINDOW)
    what = tr("the prompt of the answer differs at character {place}", place=place)
    return what, trained[shown], served[shown], has_history and trained == served


def _before_block(prompt: str) -> str:
    return prompt[: open_block(prompt)[0]]
