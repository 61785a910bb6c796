"""Cards: what a config needs to know of one model or one dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class Code(str):
    """A value that is written into a config as it stands (``PROMPT_TEMPLATE.gemma``), unquoted."""

    __slots__ = ()


def N_(message: str, /) -> str:
    """Mark a reason for the catalogue of messages; who shows it translates it.

    ``xtuner.utils.lang`` has the same: this package imports nothing of the others.
    """
    return message


@dataclass(frozen=True)
class ModelCard:
    """One model that can be trained.

    Args:
        name: how config names begin, for example ``qwen2_5_7b_instruct``.
        path: its name on the Hugging Face hub.
        billions: parameters, in billions (all experts of a mixture counted).
        template: the ``PROMPT_TEMPLATE`` that it was, or is to be, trained with; ``auto`` stands
            for the tokenizer's own chat template.
        chat: whether it has already learnt to answer (base models have not).
        tokenizer: keyword arguments for its tokenizer besides the usual ones.
        settings: settings that differ from the defaults and the dataset's.
        recipes: what ``list-cfg`` shows of it: the rest of a name after the model's.
        kind: ``text``, or ``vision`` if its chat template takes images too.
        unsupported: method -> why this model cannot be trained so, marked by ``N_`` (``full``
            covers every ``*_full``; ``dpo`` covers every ``dpo_*``).
    """

    name: str
    path: str
    billions: float
    template: str = "default"
    chat: bool = False
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    recipes: tuple[str, ...] = ()
    kind: str = "text"
    unsupported: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The model's own name, without its owner."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """One set of rows: where it comes from and how a row is read.

    Args:
        variable: the name of the built dataset in the config.
        part: the file of ``parts`` that shows how it is built.
        path: the setting that holds the place of the data, and its value.
        map_fn: the function that reads a row; None where the rows are conversations already.
        load: keyword arguments of ``load_dataset`` besides the path, as they are written.
        loader: the ``path`` of ``load_dataset`` for local files.
    """

    variable: str
    part: str
    path: tuple[str, Any]
    map_fn: str | None = None
    load: str = ""
    loader: str = "json"


@dataclass(frozen=True)
class DatasetCard:
    """One dataset, made of one or more sources.

    Args:
        name: its place in config names, for example ``alpaca_enzh``.
        title: what people call it.
        sources: where its rows come from, in order.
        kind: ``sft``, ``pretrain``, ``vision`` or ``preference``: which methods it is for.
        template: the template that its rows need, where it is not the model's.
        settings: settings that belong to it (the system prompt, questions to ask meanwhile, ...).
        hook: keyword arguments of ``EvaluateChatHook`` besides the usual ones.
        note: what whoever uses it has to know: how to get it, or what a row looks like.
    """

    name: str
    title: str
    sources: tuple[Source, ...]
    kind: str = "sft"
    template: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    hook: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def packed(self) -> bool:
        """Whether several samples share a row; MOSS conversations fill rows of their own."""
        moss = any(source.part == "data_moss" for source in self.sources)
        return not moss and self.settings.get("pack_to_max_length", True)
