"""Training, the tokenizer's chat template and chat build the same prompt: found by comparing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr
from xtuner.utils.terminal import printable
from xtuner.utils.types import Tokenizer

if TYPE_CHECKING:
    from xtuner.tokenization.template_check import Difference

Conversation = tuple[str, Sequence[tuple[str, str]]]
"""A system text (may be empty) and pairs of question and answer."""

PROBES: list[Conversation] = [
    ("", [("Please introduce yourself", "I am a small assistant.")]),
    ("You are kind.", [("What is 1 + 1?", "It is 2."), ("And 2 + 2?", "4")]),
    ("", [("请做一下自我介绍", "我是一个小助手。"), ("谢谢", "不客气！"), ("再见", "再见。")]),
    ('Answer in JSON: {"name": "{input}"}', [("{system} {{x}}", '{"a": [1, 2]}')]),
    ("", [("def add(a, b):", "return a + b\n\nprint(add(1, 2))")]),
    ("", [("1 + 1?", "<think>\nA sum.\n</think>\n\n2"), ("2 + 2?", "<think>\n\n</think>\n\n4")]),
]
"""Conversations that show what templates commonly get wrong."""


@dataclass(frozen=True)
class Mismatch:
    """Two ways of building a prompt that disagree.

    Attributes:
        what: what disagrees.
        conversation: the conversation with which it does; None for what holds for all.
        expected: the text or ids of training.
        found: those of the other way.
        harmless: the text is the same; only where an earlier answer of the conversation touches
            its surroundings is it cut into other tokens.
    """

    what: str
    conversation: Conversation | None = None
    expected: str = ""
    found: str = ""
    harmless: bool = False

    def __str__(self) -> str:
        lines = [self.what]
        if self.conversation is not None:
            lines.append(tr("question: {question!r}", question=self.conversation[1][-1][0]))
        if self.expected or self.found:
            lines += [tr("training: {expected}", expected=self.expected)]
            lines += [tr("serving:  {found}", found=self.found)]
        return "\n    ".join(lines)


def compare(
    tokenizer: Tokenizer,
    template: Mapping[str, Any],
    conversations: Sequence[Conversation] = PROBES,
    saved_stop_ids: Sequence[int] | None = None,
) -> list[Mismatch]:
    """Build each conversation as training and chat do, and with the tokenizer's chat template.

    Args:
        tokenizer: with the chat template that will be served.
        template: the entry of ``PROMPT_TEMPLATE`` that training uses.
        conversations: what to try.
        saved_stop_ids: what the saved generation config stops at; None: what would be saved.

    Returns:
        All disagreements, at most one a conversation.
    """
    from xtuner.chat.prompt import ChatPrompt, Turn, to_messages

    prompt = ChatPrompt(tokenizer, template)
    stops = prompt.stops()[0] if saved_stop_ids is None else list(saved_stop_ids)
    problems = []
    for conversation in conversations:
        system, pairs = conversation
        turns = [Turn(question, answer) for question, answer in pairs]
        trained, chatted = trained_ids(tokenizer, template, conversation), prompt.ids(turns, system)
        if trained != chatted:
            problems.append(_difference(tokenizer, conversation, trained, chatted, False))
            continue
        for known in ([*turns[:-1], Turn(turns[-1].question)], turns):
            expected = prompt.ids(known, system)
            text = tokenizer.apply_chat_template(
                to_messages(known, system), tokenize=False, add_generation_prompt=True
            )
            found = prompt.encode(text)
            if expected != found:
                same_text = "".join(prompt.segments(known, system)) == text
                harmless = same_text and known[0].answer is not None
                problems.append(_difference(tokenizer, conversation, expected, found, harmless))
                break
    last = prompt.answer_end()
    if last not in stops:
        end = tokenizer.decode([last]) if last is not None else ""
        problems.append(
            Mismatch(
                tr(
                    "answers end with {end!r} ({last}) in training, at which generation "
                    "does not stop (it stops at {stops})",
                    end=end,
                    last=last,
                    stops=stops,
                )
            )
        )
    return problems


def trained_ids(
    tokenizer: Tokenizer, template: Mapping[str, Any], conversation: Conversation
) -> list[int]:
    """The token ids of a conversation as the data of a training has them."""
    from xtuner.dataset.map_fns import template_map_fn_factory
    from xtuner.tokenization.encode import encode_conversation

    system, pairs = conversation
    turns = [{"input": question, "output": answer} for question, answer in pairs]
    turns[0]["system"] = system
    mapped = template_map_fn_factory(template)({"conversation": turns})
    return encode_conversation(mapped["conversation"], tokenizer)["input_ids"]


def refuse(problems: Sequence[Mismatch | Difference]) -> None:
    """Raise the error that names the disagreements; only mention the harmless ones."""
    harmless = [problem for problem in problems if problem.harmless]
    if harmless:
        print(
            tr(
                "note: in {count} conversation(s) an earlier answer is the same text in "
                "serving but cut into other tokens where it touches the template:",
                count=len(harmless),
            )
        )
        print(f"  {printable(str(harmless[0]))}")
    grave = [problem for problem in problems if not problem.harmless]
    if not grave:
        return
    listed = "\n  ".join(str(problem) for problem in grave[:5])
    raise UserError(
        tr("training and serving would not build the same prompt:\n  {listed}", listed=listed),
        hint=tr(
            "train with the template of this model's family and a tokenizer that knows its "
            "special tokens; 'convert pth_to_hf --force' writes the model all the same."
        ),
    )


def _difference(
    tokenizer: Tokenizer,
    conversation: Conversation,
    expected: list[int],
    found: list[int],
    harmless: bool,
) -> Mismatch:
    pairs = enumerate(zip(expected, found, strict=False))
    place = next((i for i, (one, other) in pairs if one != other), min(len(expected), len(found)))
    window = slice(max(0, place - 3), place + 5)
    return Mismatch(
        tr("token {place} differs", place=place),
        conversation,
        str(tokenizer.convert_ids_to_tokens(expected[window])),
        str(tokenizer.convert_ids_to_tokens(found[window])),
        harmless,
    )
