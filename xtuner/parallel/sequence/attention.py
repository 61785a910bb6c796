"""v0.1's functions that put a user's own attention between the two all-to-alls."""

from __future__ import annotations

from collections.abc import Callable

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
    """Receive all tokens of this rank's heads.

    Args:
        query_states: (B, S/N, H, D), or (B, H, S/N, D) with the dimensions swapped.
        key_states: likewise, with H heads or a divisor of H.
        value_states: likewise.
        scatter_dim: the dimension of the heads, 2 or 1.
        gather_dim: the dimension of the tokens, 1 or 2.

    Returns:
        The three in the same layout, with S tokens and this rank's heads. H need not be divisible
        by the number of ranks N.
    """
    group = get_sequence_parallel_group()
    if group is None:
        return query_states, key_states, value_states
    swap = _is_token_major(gather_dim, scatter_dim)
    query, key, value = (_swapped(t, swap) for t in (query_states, key_states, value_states))
    query, key, value = (_swapped(t, swap) for t in to_heads(query, key, value, group))
    return query, key, value


def post_process_for_sequence_parallel_attn(
    attn_output: Tensor, scatter_dim: int = 1, gather_dim: int = 2
) -> Tensor:
    """Receive all heads of this rank's tokens.

    Args:
        attn_output: (B, S, h, D), or (B, h, S, D) with the dimensions swapped.
        scatter_dim: the dimension of the tokens, 1 or 2.
        gather_dim: the dimension of the heads, 2 or 1.

    Returns:
        (B, S/N, H, D), or (B, H, S/N, D).
    """
    group = get_sequence_parallel_group()
    if group is None:
        return attn_output
    swap = not _is_token_major(scatter_dim, gather_dim)
    heads = torch.tensor(attn_output.shape[gather_dim], device=attn_output.device)
    dist.all_reduce(heads, group=group)
    token_major = _swapped(attn_output, swap)
    return _swapped(to_tokens(token_major, int(heads), group), swap)


def sequence_parallel_wrapper(local_attn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make an attention function sequence-parallel.

    Args:
        local_attn: takes query, key and value (B, S, h, D) and returns (B, S, h, D).

    Returns:
        A function from (B, S/N, H, D) to (B, S/N, H, D). With ``training=False`` among its keywords
        it calls ``local_attn`` on rows that are not sharded.
    """

    def sequence_parallel(
        query_states: Tensor,
        key_states: Tensor,
        value_states: Tensor,
        *args: object,
        **kwargs: object,
    ) -> Tensor:
        group = get_sequence_parallel_group() if kwargs.pop("training", True) else None
        if group is None:
            return local_attn(query_states, key_states, value_states, *args, **kwargs)
        three = pre_process_for_sequence_parallel_attn(query_states, key_states, value_states)
        if three[0].shape[2]:
            out = local_attn(*three, *args, **kwargs)
        else:
            out = no_heads(*(tensor.transpose(1, 2) for tensor in three))
        return to_tokens(out, query_states.shape[2], group)

    return sequence_parallel


def _is_token_major(tokens: int, heads: int) -> bool:
    """Whether the layout is (B, S, H, D), not (B, H, S, D)."""
    if {tokens, heads} != {1, 2}:
        raise ValueError(f"tokens and heads are dimensions 1 and 2, not {tokens} and {heads}")
    return tokens == 1


def _swapped(tensor: Tensor, swap: bool) -> Tensor:
    return tensor.transpose(1, 2) if swap else tensor
