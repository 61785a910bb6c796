"""Chunked attention (Llama 4), which our attention function computes as full attention."""

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
