"""Puts a prompt template around the turns of a conversation."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xtuner.tokenization.chat_template import render_question
from xtuner.tokenization.content import is_on
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.templates import AUTO_TEMPLATE, PROMPT_TEMPLATE

Row = Mapping[str, Any]


def template_map_fn(example: Row, template: Mapping[str, Any]) -> dict[str, Any]:
    """Add a template to one row.

    Args:
        example: a row with ``conversation``: turns with ``input``, ``output`` and, where given,
            ``system``, ``output_with_loss``, ``need_eos_token``, ``sep``.
        template: an entry of ``PROMPT_TEMPLATE``.

    Returns:
        ``{'conversation': turns}``: inputs and outputs as the model sees them.
    """
    turns = []
    for number, turn in enumerate(example["conversation"], start=1):
        question = str(turn.get("input") or "")
        system = str(turn.get("system") or "")
        answer = str(turn.get("output") or "")
        ends = is_on(turn, "need_eos_token") and not template.get("SUFFIX_AS_EOS", False)
        if question or system or turn_is_answer(turn):
            question = render_question(template, question, number, system)
        turns.append(
            {
                "input": question,
                "output": answer + (template.get("SUFFIX", "") if turn_is_answer(turn) else ""),
                "need_eos_token": ends,
                "sep": str(turn.get("sep") or template.get("SEP", "")),
                "output_with_loss": is_on(turn, "output_with_loss"),
            }
        )
    return {"conversation": turns}


def turn_is_answer(turn: Row) -> bool:
    """Whether a turn's output answers something; plain text to train on gets no suffix."""
    return is_on(turn, "need_eos_token")


@dataclass(frozen=True)
class TemplateMapFn:
    """``template_map_fn`` with its template; ``AUTO_TEMPLATE`` leaves the turns as they are."""

    template: Any
    template_arguments: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, example: Row) -> dict[str, Any]:
        if self.template == AUTO_TEMPLATE:
            return {"conversation": example["conversation"]}
        return template_map_fn(example, self.template)


def template_map_fn_factory(
    template: Mapping[str, Any] | str, template_arguments: Mapping[str, Any] | None = None
) -> TemplateMapFn:
    """Make the function that adds a template to rows.

    Args:
        template: an entry of ``PROMPT_TEMPLATE``, its name (``'qwen_chat'`` or
            ``'xtuner.utils.PROMPT_TEMPLATE.qwen_chat'``), or ``PROMPT_TEMPLATE.auto``.
        template_arguments: with ``PROMPT_TEMPLATE.auto``: given to the tokenizer's chat template,
            such as ``dict(enable_thinking=False)``.

    Raises:
        UserError: for a name that no template has, and for ``template_arguments`` with a named
            template, which takes none.
    """
    if template_arguments and template != AUTO_TEMPLATE:
        raise UserError(
            tr("a named template takes no template_arguments"),
            hint=tr("template=PROMPT_TEMPLATE.auto uses the tokenizer's own chat template."),
            where=Where(key="template_arguments"),
        )
    if isinstance(template, str):
        template = template_named(template)
    return TemplateMapFn(template, dict(template_arguments or {}))


def template_named(name: str) -> Any:
    """A prompt template by its name.

    Args:
        name: such as ``qwen_chat``, or with its module: ``xtuner.utils.PROMPT_TEMPLATE.qwen_chat``.

    Raises:
        UserError: where there is none of this name.
    """
    if name == AUTO_TEMPLATE:
        return AUTO_TEMPLATE
    module, _, last = name.rpartition(".PROMPT_TEMPLATE.")
    try:
        return (importlib.import_module(module).PROMPT_TEMPLATE if module else PROMPT_TEMPLATE)[
            last
        ]
    except (ImportError, AttributeError, KeyError) as error:
        raise UserError(
            tr("there is no prompt template {name!r}", name=name),
            hint=tr("one of: {names}", names=", ".join(sorted(PROMPT_TEMPLATE))),
        ) from error
