"""The error for a token id that the model has no embedding for."""

from __future__ import annotations

from collections.abc import Sequence

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr


def lacks_embedding(largest: int, size: int, places: Sequence[object]) -> UserError:
    """The error for a token id that the model has no embedding for.

    Args:
        largest: the id.
        size: of the model's vocabulary.
        places: the rows that have it, where they are known.
    """
    rows = ", ".join(str(place) for place in places[:3])
    return UserError(
        tr(
            "the data have the token id {largest}, but the model's vocabulary has "
            "{vocab_size} entries",
            largest=largest,
            vocab_size=size,
        )
        + (f" ({rows})" if rows else ""),
        hint=tr(
            "use the model's own tokenizer (and, for a reward model, one of its ids as "
            "reward_token_id); model.tokenizer = tokenizer makes room for added tokens."
        ),
        where=Where(key="tokenizer"),
    )
