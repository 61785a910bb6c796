"""The row layouts: which fields each map function reads, of which kind; and telling them apart.

Standard library only, so that ``xtuner list-dataset-format`` answers at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from xtuner.tokenization import roles
from xtuner.utils.lang import tr

TEXT, MESSAGES, SHAREGPT, TURNS = "text", "messages", "from/value", "turns"


@dataclass(frozen=True)
class Layout:
    """One row layout.

    Args:
        name: its key in ``DATASET_FORMAT_MAPPING``.
        fields: the fields that its map function reads, and the kind of each.
        map_fn: name of the map function in ``xtuner.dataset.map_fns``; empty when none is needed.
        roles: for lists of messages, the roles understood: role -> ``system``, ``user``,
            ``assistant`` or ``tool``.
        preference: whether it is for DPO, ORPO and reward models.
        optional: fields that rows may leave empty, or out where others have them.
    """

    name: str
    fields: Mapping[str, str]
    map_fn: str = ""
    roles: Mapping[str, str] | None = None
    preference: bool = False
    optional: frozenset[str] = frozenset()

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has every field, each of the right kind."""
        for name, kind in self.fields.items():  # a row is asked for many layouts
            if name not in row:
                return False
            if self.field_problem(row, name, kind):
                return False
        return True

    def field_problem(self, row: Mapping[str, Any], name: str, kind: str) -> tuple[str, str] | None:
        """``kind_problem`` of a field that is there; null is none where it is optional."""
        if row[name] is None and name in self.optional:
            return None
        return kind_problem(row[name], kind)


def _texts(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, TEXT)


_INPUT = frozenset({"input", "input_zh"})
_SYSTEM = frozenset({"system_prompt"})

# Of layouts with the same fields the first is the one to recommend.
LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("xtuner", {"conversation": TURNS}),
        Layout(
            "alpaca", _texts("instruction", "input", "output"), "alpaca_map_fn", optional=_INPUT
        ),
        Layout(
            "alpaca_zh",
            _texts("instruction_zh", "input_zh", "output_zh"),
            "alpaca_zh_map_fn",
            optional=_INPUT,
        ),
        Layout("arxiv", _texts("abstract", "title"), "arxiv_map_fn"),
        Layout("code_alpaca", _texts("prompt", "completion"), "code_alpaca_map_fn"),
        Layout("colors", _texts("description", "color"), "colors_map_fn"),
        Layout("default", _texts("input", "output"), "default_map_fn", optional=_INPUT),
        Layout(
            "crime_kg_assitan",
            _texts("input", "output"),
            "crime_kg_assitant_map_fn",
            optional=_INPUT,
        ),
        Layout("law_reference", _texts("question", "answer"), "law_reference_map_fn"),
        Layout("wizardlm", {"conversations": SHAREGPT}, "wizardlm_map_fn", roles.SHAREGPT),
        Layout("llava", {"conversations": SHAREGPT}, "llava_map_fn", roles.SHAREGPT),
        Layout(
            "llava_image_only",
            {"conversations": SHAREGPT},
            "llava_image_only_map_fn",
            roles.SHAREGPT,
        ),
        Layout(
            "medical", _texts("instruction", "input", "output"), "medical_map_fn", optional=_INPUT
        ),
        Layout(
            "msagent_react",
            {"conversations": SHAREGPT},
            "msagent_react_map_fn",
            {"system": "system", "user": "user", "assistant": "assistant"},
        ),
        Layout("oasst1", _texts("text"), "oasst1_map_fn"),
        Layout("openai", {"messages": MESSAGES}, "openai_map_fn", roles.OPENAI),
        Layout(
            "openorca",
            _texts("system_prompt", "question", "response"),
            "openorca_map_fn",
            optional=frozenset({"system_prompt"}),
        ),
        Layout("pretrain", _texts("text"), "pretrain_map_fn"),
        Layout("sql", _texts("context", "question", "answer"), "sql_map_fn"),
        Layout("stack_exchange", _texts("question", "response"), "stack_exchange_map_fn"),
        Layout("tiny_codes", _texts("prompt", "response"), "tiny_codes_map_fn"),
        Layout(
            "intel_orca_dpo",
            _texts("system", "question", "chosen", "rejected"),
            "intel_orca_dpo_map_fn",
            preference=True,
        ),
        Layout(
            "orpo_dpo_mix_40k",
            {"chosen": MESSAGES, "rejected": MESSAGES},
            "orpo_dpo_mix_40k_map_fn",
            roles.OPENAI,
            preference=True,
        ),
        Layout(
            "preference",
            {"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES},
            roles=roles.OPENAI,
            preference=True,
        ),
    )
}
"""Every layout by its key in ``DATASET_FORMAT_MAPPING``; the last three are for preferences."""

BY_AUTO: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("ms-swift", _texts("query", "response"), "auto_map_fn"),
        Layout("llama-factory", _texts("instruction", "output"), "auto_map_fn"),
        Layout("question/answer", _texts("question", "answer"), "auto_map_fn"),
        Layout("sharegpt", {"conversations": SHAREGPT}, "auto_map_fn", roles.ANY),
        Layout("sharegpt (role/content)", {"conversations": MESSAGES}, "auto_map_fn", roles.ANY),
    )
}
"""Layouts of other tools, which no published map function reads whole."""

AUTO = Layout("auto", {}, "auto_map_fn", roles.ANY)
"""Recognises the layout of each row by itself."""

READ_BY_AUTO = frozenset(
    {
        *("xtuner", "alpaca", "alpaca_zh", "code_alpaca", "default", "wizardlm", "oasst1"),
        *("openai", "pretrain", "stack_exchange", "tiny_codes", *BY_AUTO),
    }
)
"""Layouts of which ``auto_map_fn`` makes what their own map functions make."""

BY_MAP_FN: Mapping[str, Layout] = {
    **{layout.map_fn: layout for layout in LAYOUTS.values() if layout.map_fn},
    AUTO.map_fn: AUTO,
}

_ROLE_KEYS, _CONTENT_KEYS = ("from", "role"), ("value", "content", "text")


def messages_of(value: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Role and content of each message of a list, in any common spelling."""
    for message in value:
        yield str(_first(message, _ROLE_KEYS, "")), _first(message, _CONTENT_KEYS, None)


def _first(message: Mapping[str, Any], keys: Iterable[str], default: object) -> Any:
    for key in keys:
        if key in message:
            return message[key]
    return default


_ITEM_KEYS = {MESSAGES: ("role",), SHAREGPT: ("from",), TURNS: ("input", "output")}
"""What items of lists have, at least one of them."""


def kind_problem(value: object, kind: str) -> tuple[str, str] | None:
    """What a field's value is and what it should be, in words; None when it is of its kind."""
    if kind == TEXT:
        return None if isinstance(value, str) or is_plain(value) else (named(value), named(""))
    if not isinstance(value, list):
        return named(value), named([])
    keys = _ITEM_KEYS[kind]
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            return f"[{index}]: {named(item)}", named({})
        if item.keys().isdisjoint(keys):
            return f"[{index}]: {', '.join(map(str, item))[:60] or '{}'}", repr(keys[0])
    return None


def is_plain(value: object) -> bool:
    """Whether training takes a value for its text: a number or a switch."""
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def named(value: object) -> str:
    """A JSON value's kind in words."""
    if value is None:
        return "null"
    names = {
        bool: "true/false",
        int: tr("number"),
        float: tr("number"),
        str: tr("text"),
        list: tr("list"),
        dict: tr("object"),
    }
    return names.get(type(value), type(value).__name__)


def layout_named(name: str) -> Layout:
    """A layout by its name, of this or of other tools."""
    return LAYOUTS.get(name) or BY_AUTO[name]


def _of_other_tools(row: Mapping[str, Any]) -> Layout | None:
    """The layout that only ``auto_map_fn`` reads whole."""
    turns = row.get("conversations")
    who: set[str] = set()
    if isinstance(turns, list):
        who = {str(turn.get("from")).lower() for turn in turns if isinstance(turn, dict)}
    if who - {"human", "gpt", "none"} and who <= set(roles.ANY) and not who & {"user", "assistant"}:
        return BY_AUTO["sharegpt"]
    earlier = row.get("history") or row.get("system")
    names = ("llama-factory", "question/answer") if earlier else ()
    fitting = (BY_AUTO[name] for name in (*names, "ms-swift", "sharegpt (role/content)"))
    return next((layout for layout in fitting if layout.fits(row)), None)


def preference_layout(row: Mapping[str, Any]) -> Layout:
    """The layout ``preference`` as a row spells it: without a prompt, or with plain texts."""
    fields = {
        name: TEXT if isinstance(row.get(name), str) else MESSAGES
        for name in ("prompt", "chosen", "rejected")
        if name in row or name != "prompt" or isinstance(row.get("chosen"), str)
    }
    return replace(LAYOUTS["preference"], fields=fields)


@functools.lru_cache(maxsize=1024)
def _with_fields(names: tuple[str, ...]) -> list[Layout]:
    """The layouts all of whose fields are among these."""
    return [layout for layout in LAYOUTS.values() if layout.fields.keys() <= set(names)]


def recognise(row: Mapping[str, Any]) -> Layout | None:
    """The layout that reads the most of a row; None when no layout fits."""
    other = _of_other_tools(row)
    if other is not None:
        return other
    fitting = [layout for layout in _with_fields(tuple(row)) if layout.fits(row)]
    if not fitting:
        return None
    if set(row) >= {"text"} and "### Human:" in str(row["text"]):
        return LAYOUTS["oasst1"]
    best = max(fitting, key=lambda layout: len(layout.fields))
    if best.name == "oasst1":
        return LAYOUTS["pretrain"]
    if best.name == "wizardlm" and "image" in row:
        return LAYOUTS["llava"]
    return best
