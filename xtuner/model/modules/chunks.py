"""Llama 4: chunked attention and temperatures by position, which are exact in short rows only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xtuner.model.modules import attention
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_within_chunks(llm: PreTrainedModel, tokens: int) -> None:
    """Refuse samples longer than the chunks of a model with chunked attention (Llama 4).

    Our attention function computes its chunked layers as full attention: the same within a chunk.

    Args:
        llm: the model.
        tokens: of the longest sample.

    Raises:
        UserError: with the settings to write instead.
    """
    config = llm.config.get_text_config()
    chunk = getattr(config, "attention_chunk_size", None)
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    if chunk is None or not chunked or tokens <= chunk:
        return
    if llm.config._attn_implementation != attention.NAME:
        return
    raise UserError(
        tr(
            "{name} attends in chunks of {chunk} tokens, and a sample has {tokens}.",
            name=type(llm).__name__,
            chunk=chunk,
            tokens=tokens,
        ),
        hint=tr(
            'set max_length to {chunk}, or model.llm.attn_implementation = "eager" and '
            "use_varlen_attn = False.",
            chunk=chunk,
        ),
        where=Where(key="max_length"),
    )


def require_own_temperatures(llm: PreTrainedModel, tokens: int) -> None:
    """Refuse packed or shared rows so long that Llama 4 takes a sample's positions from the row.

    Its layers without rotary embedding scale queries by the position (``attn_temperature_tuning``),
    which they count from the start of the call's row, whatever ``position_ids`` are. Up to
    ``floor_scale`` tokens the factor is 1, but for the last one, which predicts nothing.

    Args:
        llm: the model.
        tokens: of the whole row.

    Raises:
        UserError: with the settings to write instead.
    """
    config = llm.config.get_text_config()
    limit = getattr(config, "floor_scale", None)
    tuned = getattr(config, "attn_temperature_tuning", False)
    rotary = getattr(config, "no_rope_layers", None) or ()
    if not tuned or limit is None or all(rotary) or tokens <= limit:
        return
    raise UserError(
        tr(
            "{name} scales attention by positions in the row, not in the sample, from {limit} "
            "tokens on, and a packed or shared row has {tokens}.",
            name=type(llm).__name__,
            limit=limit,
            tokens=tokens,
        ),
        hint=tr(
            "set max_length to {limit}, or use_varlen_attn = False and sequence_parallel_size = 1.",
            limit=limit,
        ),
        where=Where(key="max_length"),
    )
