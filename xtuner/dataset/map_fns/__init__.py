"""Functions from a row of a published format to ``{'conversation': [turn, ...]}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from xtuner.dataset.map_fns.auto import auto_map_fn
from xtuner.dataset.map_fns.dataset_map_fns.dialogue import (
    llava_image_only_map_fn,
    llava_map_fn,
    oasst1_map_fn,
    openai_map_fn,
    wizardlm_map_fn,
)
from xtuner.dataset.map_fns.dataset_map_fns.msagent import msagent_react_map_fn
from xtuner.dataset.map_fns.dataset_map_fns.single_turn import (
    alpaca_map_fn,
    alpaca_zh_map_fn,
    arxiv_map_fn,
    code_alpaca_map_fn,
    colors_map_fn,
    crime_kg_assitant_map_fn,
    default_map_fn,
    law_reference_map_fn,
    medical_map_fn,
    openorca_map_fn,
    pretrain_map_fn,
    sql_map_fn,
    stack_exchange_map_fn,
    tiny_codes_map_fn,
)
from xtuner.dataset.map_fns.template_map_fn import template_map_fn, template_map_fn_factory
from xtuner.registry import BUILDER, MAP_FUNC
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.types import MapFunction, RowFunction

DATASET_FORMAT_MAPPING = {
    "alpaca": alpaca_map_fn,
    "alpaca_zh": alpaca_zh_map_fn,
    "arxiv": arxiv_map_fn,
    "code_alpaca": code_alpaca_map_fn,
    "colors": colors_map_fn,
    "crime_kg_assitan": crime_kg_assitant_map_fn,  # spelt so in v0.1
    "default": default_map_fn,
    "law_reference": law_reference_map_fn,
    "llava_image_only": llava_image_only_map_fn,
    "llava": llava_map_fn,
    "medical": medical_map_fn,
    "msagent_react": msagent_react_map_fn,
    "oasst1": oasst1_map_fn,
    "openai": openai_map_fn,
    "openorca": openorca_map_fn,
    "pretrain": pretrain_map_fn,
    "sql": sql_map_fn,
    "stack_exchange": stack_exchange_map_fn,
    "tiny_codes": tiny_codes_map_fn,
    "wizardlm": wizardlm_map_fn,
}


def map_function_named(name: str) -> RowFunction:
    """A map function by its name.

    Args:
        name: of this package (``alpaca_map_fn``), registered, or with its module.

    Raises:
        UserError: where there is none of this name.
    """
    own = {each.__name__: each for each in (auto_map_fn, *DATASET_FORMAT_MAPPING.values())}
    found: RowFunction | None = own.get(name) or MAP_FUNC.get(name)
    if found is None:
        raise UserError(
            tr("there is no map function {function!r}", function=name),
            hint=tr("'xtuner list-dataset-format' lists them."),
            where=Where(key="dataset_map_fn"),
        )
    return found


def row_function(function: MapFunction | str | Mapping[str, Any] | None) -> RowFunction | None:
    """A row function from what a config may hold: itself, its registered name, or its builder."""
    if isinstance(function, str):
        return map_function_named(function)
    if isinstance(function, Mapping):
        return BUILDER.build(dict(function))
    return cast(RowFunction | None, function)


__all__ = [
    "DATASET_FORMAT_MAPPING",
    "alpaca_map_fn",
    "alpaca_zh_map_fn",
    "arxiv_map_fn",
    "auto_map_fn",
    "code_alpaca_map_fn",
    "colors_map_fn",
    "crime_kg_assitant_map_fn",
    "default_map_fn",
    "law_reference_map_fn",
    "llava_image_only_map_fn",
    "llava_map_fn",
    "map_function_named",
    "medical_map_fn",
    "msagent_react_map_fn",
    "oasst1_map_fn",
    "openai_map_fn",
    "openorca_map_fn",
    "pretrain_map_fn",
    "row_function",
    "sql_map_fn",
    "stack_exchange_map_fn",
    "template_map_fn",
    "template_map_fn_factory",
    "tiny_codes_map_fn",
    "wizardlm_map_fn",
]
