"""The prompt template and tokenizer of a training config, and how they are exported."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.registry import BUILDER
from xtuner.tokenization.chat_template import answer_stops, set_arguments, to_jinja
from xtuner.tokenization.segments import bos_and_eos
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr
from xtuner.utils.templates import AUTO_TEMPLATE, PROMPT_TEMPLATE

if TYPE_CHECKING:
    from xtuner.utils.types import Tokenizer


def template_of(cfg: Mapping[str, Any]) -> dict[str, Any] | None:
    """The prompt template of a config's training data.

    Returns:
        Its fields; None when the data use the tokenizer's own chat template, or none.

    Raises:
        UserError: when datasets of one run use different templates.
    """
    found: list[Any] = []
    for section in ("train_dataloader", "train_dataset"):
        for template in _templates(cfg.get(section)):
            if template not in found:
                found.append(template)
    if found and uses_own_template(cfg):
        found.append(AUTO_TEMPLATE)
    if len(found) > 1:
        raise UserError(
            tr(
                "the training data use {count} different prompt templates; "
                "a model can be exported with one.",
                count=len(found),
            ),
            hint=tr(
                "use one template for all datasets, or convert with --force to leave the "
                "tokenizer's chat template as it is."
            ),
        )
    return found[0] if found else None


def tokenizer_of(cfg: Mapping[str, Any]) -> Any:
    """The config's tokenizer, built, or that of its processor; None when it names none.

    The ``template_arguments`` of the training data are part of its chat template.

    Raises:
        UserError: when datasets of one run have different ones.
    """
    section = cfg.get("tokenizer")
    tokenizer = BUILDER.build(section) if isinstance(section, Mapping) else section
    if tokenizer is None:
        tokenizer = getattr(processor_of(cfg), "tokenizer", None)
    arguments = template_arguments_of(cfg)
    if tokenizer is not None and arguments:
        set_arguments(tokenizer, arguments)
    return tokenizer


def processor_of(cfg: Mapping[str, Any]) -> Any:
    """The processor of a config's model, built; None where it has none, as models of text."""
    section = (cfg.get("model") or {}).get("processor")
    return BUILDER.build(section) if isinstance(section, Mapping) else section


def template_arguments_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What the training data give to the tokenizer's own chat template.

    Raises:
        UserError: when datasets of one run give different values.
    """
    found: list[dict[str, Any]] = []
    for section in ("train_dataloader", "train_dataset"):
        for chosen in _template_functions(cfg.get(section)):
            arguments = dict(chosen.get("template_arguments") or {})
            if arguments not in found:
                found.append(arguments)
    if len(found) > 1:
        raise UserError(
            tr("the training data use different template_arguments: {found}", found=found),
            hint=tr("use the same template_arguments for all datasets."),
        )
    return found[0] if found else {}


def uses_own_template(cfg: Mapping[str, Any]) -> bool:
    """Whether training data use the tokenizer's own chat template."""
    sections = (cfg.get("train_dataloader"), cfg.get("train_dataset"))
    chosen = (one for section in sections for one in _template_functions(section))
    return any(one.get("template") == AUTO_TEMPLATE for one in chosen)


def thinking_of(cfg: Mapping[str, Any]) -> str:
    """The ``train_thinking`` of the training data; ``keep`` where datasets have different ones."""
    found: set[str] = set()
    for section in ("train_dataloader", "train_dataset"):
        found |= {str(one) for one in _values(cfg.get(section), "train_thinking")}
    return found.pop() if len(found) == 1 else "keep"


def reward_token_of(cfg: Mapping[str, Any]) -> int | None:
    """The token that ends the texts of a reward model's data; None for other trainings."""
    dataset = (cfg.get("train_dataloader") or {}).get("dataset") or {}
    return dataset["reward_token_id"] if dataset.get("is_reward") else None


def _templates(node: object) -> Iterator[dict[str, Any]]:
    for chosen in _template_functions(node):
        template = _resolve(chosen.get("template"))
        if template is not None:
            yield template


def _template_functions(node: object) -> Iterator[Mapping[str, Any]]:
    chosen = _values(node, "template_map_fn")
    return (one for one in chosen if isinstance(one, Mapping))


def _values(node: object, name: str) -> Iterator[Any]:
    """The values of a key, at any depth."""
    if isinstance(node, Mapping):
        if name in node:
            yield node[name]
        for key, value in node.items():
            if key != name:
                yield from _values(value, name)
    elif isinstance(node, list | tuple):
        for item in node:
            yield from _values(item, name)


def _resolve(template: object) -> dict[str, Any] | None:
    """A template given as its fields, its name, or a dotted path such as in published configs."""
    if isinstance(template, str):
        if template == AUTO_TEMPLATE:
            return None
        name = template.rpartition(".")[2]
        if name in PROMPT_TEMPLATE:
            return dict(PROMPT_TEMPLATE[name])
        module, _, attribute = template.rpartition(".")
        template = getattr(importlib.import_module(module), attribute)
    return dict(template) if isinstance(template, Mapping) else None


def trained_templates(tokenizer: Tokenizer) -> list[str]:
    """The names of the published template that ``set_chat_template`` put into a tokenizer.

    Several where they are the same; empty where its chat template is none of them.
    """
    return [
        name
        for name, template in PROMPT_TEMPLATE.items()
        if isinstance(template, Mapping) and _jinja(tokenizer, template) == tokenizer.chat_template
    ]


def _jinja(tokenizer: Tokenizer, template: Mapping[str, Any]) -> str:
    prefix, _ = bos_and_eos(tokenizer)
    return to_jinja(template, with_bos=tokenizer.bos_token_id is not None, prefix=prefix)


def set_chat_template(tokenizer: Tokenizer, template: Mapping[str, Any]) -> None:
    """Make a template the tokenizer's chat template, whose special tokens it finds in a text."""
    tokenizer.chat_template = _jinja(tokenizer, template)
    if hasattr(tokenizer, "mark_template_tokens"):
        tokenizer.mark_template_tokens()


def write_stop_tokens(
    folder: Path, tokenizer: Tokenizer, template: Mapping[str, Any] | None
) -> list[int]:
    """Add the template's stop tokens to ``eos_token_id`` of a folder's generation config.

    The ids that the base stops at are kept.

    Args:
        folder: of the exported model or adapter.
        tokenizer: of the run.
        template: the fields of a ``PROMPT_TEMPLATE``; None for the tokenizer's own chat template.

    Returns:
        The ids of the template's stop tokens.
    """
    ids = answer_stops(tokenizer, template)[0]
    if template is None and ids in ([], [tokenizer.eos_token_id]):
        return ids  # what everyone stops at
    file = folder / "generation_config.json"
    content = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    base_ids = content.get("eos_token_id")
    if not isinstance(base_ids, list):
        base_ids = [] if base_ids is None else [base_ids]
    content["eos_token_id"] = list(dict.fromkeys([*ids, *base_ids]))
    if tokenizer.bos_token_id is not None:
        content.setdefault("bos_token_id", tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        content.setdefault("pad_token_id", tokenizer.pad_token_id)
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return ids
