"""The published functions that put an attention of one's own between the exchanges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xtuner.parallel.sequence.groups import get_sequence_parallel_group
from xtuner.parallel.sequence.heads import no_heads, to_heads, to_tokens


def pre_process_for_sequence_parallel_attn(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    scatter_dim: int = 2,
    gather_dim: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """All tokens of this rank's heads.

    Args:
        query_states: (B, S/N, H, D), or (B, H, S/N, D) with the dimensions the other way round.
        key_states: likewise, with as many heads or a divisor of them.
        value_states: likewise.
        scatter_dim: the dimension of the heads, 2 or 1.
        gather_dim: the dimension of the tokens, 1 or 2.

    Returns:
        The three in the same layout, with S tokens and this rank's heads. H need not be divisible
        by the number of ranks.
    """
    group = get_sequence_parallel_group()
    if group is None:
        return query_states, key_states, value_states
    turned = _tokens_first(gather_dim, scatter_dim)
    given = [_turn(t, turned) for t in (query_states, key_states, value_states)]
    query, key, value = (_turn(t, turned) for t in to_heads(given[0], given[1], given[2], group))
    return query, key, value


def post_process_for_sequence_parallel_attn(
    attn_output: Tensor, scatter_dim: int = 1, gather_dim: int = 2
) -> Tensor:
    """All heads of this rank's tokens.

    Args:
        attn_output: (B, S, h, D), or (B, h, S, D) with the dimensions the other way round.
        scatter_dim: the dimension of the tokens, 1 or 2.
        gather_dim: the dimension of the heads, 2 or 1.

    Returns:
        (B, S/N, H, D), or (B, H, S/N, D).
    """
    group = get_sequence_parallel_group()
    if group is None:
        return attn_output
    turned = _tokens_first(scatter_dim, gather_dim)
    heads = torch.tensor(attn_output.shape[gather_dim], device=attn_output.device)
    dist.all_reduce(heads, group=group)
    by_token = _turn(attn_output, not turned)
    return _turn(to_tokens(by_token, int(heads), group), not turned)


def sequence_parallel_wrapper(local_attn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make an attention of whole rows one of rows that ranks share.

    Args:
        local_attn: takes query, key and value (B, S, h, D) and gives (B, S, h, D).

    Returns:
        A function that takes (B, S/N, H, D) and gives (B, S/N, H, D). With ``training=False`` among
        its keywords it computes rows that are not shared.
    """

    def shared(
        query_states: Tensor, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        group = get_sequence_parallel_group() if kwargs.pop("training", True) else None
        if group is None:
            return local_attn(query_states, key_states, value_states, *args, **kwargs)
        three = pre_process_for_sequence_parallel_attn(query_states, key_states, value_states)
        if three[0].shape[2]:
            out = local_attn(*three, *args, **kwargs)
        else:
            out = no_heads(*(_turn(tensor, True) for tensor in three))
        return to_tokens(out, query_states.shape[2], group)

    return shared


def _tokens_first(tokens: int, heads: int) -> bool:
    """Whether the layout is (B, S, H, D); (B, H, S, D) otherwise."""
    if {tokens, heads} != {1, 2}:
        raise ValueError(f"tokens and heads are dimensions 1 and 2, not {tokens} and {heads}")
    return tokens == 1


def _turn(tensor: Tensor, turned: bool) -> Tensor:
    return tensor.transpose(1, 2) if turned else tensor
