"""Models whose rows are shared by several ranks: what they must be like, and their positions."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xtuner.model.modules.packed_rotary import depends_on_length
from xtuner.parallel.sequence.padding import padded
from xtuner.parallel.sequence.shard import SequenceShard
from xtuner.utils.errors import UserError, Where, first_sentence
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

PROBE_TOKENS = 16  # of each rank
# How far the two may be apart, relative to the norm: in float32 on a CPU, and where numbers are
# rounded more. A model that looks along rows by other means is off by far more than that.
BOUND, ROUNDED_BOUND = 1e-3, 0.2


@torch.no_grad()
def require_agreement(llm: PreTrainedModel, body: nn.Module, rows: Tensor) -> None:
    """See on a few tokens that sharing a row gives what one rank alone computes.

    Args:
        llm: the model, for the message.
        body: what is called, in evaluation mode: dropout would make two calls differ.
        rows: (B, S) ids or (B, S, H) embeddings; the first tokens of the first row are taken.

    Raises:
        UserError: on all ranks, when it does not, or when the model fails.
    """
    try:
        relative = _difference_by_sharing(body, rows)
    except UserError:
        raise
    except Exception as error:  # classes of transformers fail in many ways, on all ranks alike
        raise not_shareable(llm, first_sentence(error)) from error
    plain = all(weight.dtype == torch.float32 for weight in body.parameters())
    exact = plain and rows.is_cpu and not torch.is_autocast_enabled("cpu")
    if not relative < (BOUND if exact else ROUNDED_BOUND):
        raise not_shareable(llm, tr("off by {relative:.1%}", relative=relative))


def _difference_by_sharing(body: nn.Module, rows: Tensor) -> float:
    """The relative difference of the outputs of shared rows, the same on all ranks."""
    shard = SequenceShard(rows.shape[1])
    probe = rows[:1, : PROBE_TOKENS * shard.size]
    shard = SequenceShard(probe.shape[1])
    name = "input_ids" if rows.dim() == 2 else "inputs_embeds"
    whole = _tokens_of(body(**{name: probe}, use_cache=False))
    part = _tokens_of(forward_sequence_parallel(body, {name: probe}, shard))
    real = shard.shard(torch.ones_like(whole[..., 0], dtype=torch.bool), False)
    wanted = shard.shard(whole)[real].float()
    difference = (part[real].float() - wanted).square().sum()
    sums = shard.add(torch.stack([difference, wanted.square().sum()]))
    return float((sums[0] / sums[1]).sqrt())


def _tokens_of(outputs: Any) -> Tensor:
    """Hidden states (B, S, H); logits (B, S, V) of a class whose body cannot be called alone."""
    hidden: Tensor | None = getattr(outputs, "last_hidden_state", None)
    return outputs.logits if hidden is None else hidden


def forward_sequence_parallel(
    model: nn.Module, inputs: Mapping[str, Any], shard: SequenceShard
) -> Any:
    """Call a transformers model with this rank's shard of the rows.

    Args:
        model: a body, or a model with its head.
        inputs: of whole rows, from ``FinetuneModel.inputs``.
        shard: this rank's shard; whole rows where it has one rank.
    """
    if shard.size == 1:
        return model(**shard.inputs(inputs), use_cache=False)
    with _whole_positions(model, inputs.get("position_ids"), shard):
        return model(**shard.inputs(inputs), use_cache=False)


def router_loss_of_rows(
    causal_lm: PreTrainedModel,
    router_logits: Any,
    rows: int,
    shard: SequenceShard,
    mask: Tensor | None,
) -> Tensor:
    """How unevenly a mixture of experts spreads the tokens of whole rows over its experts.

    Args:
        causal_lm: the model; its own module has the function.
        router_logits: of each layer (B S/N, E), of this rank's shard.
        rows: B.
        shard: this rank's shard.
        mask: (B, S), 0 at padding.

    Returns:
        The same scalar on every rank.
    """
    function = getattr(sys.modules[type(causal_lm).__module__], "load_balancing_loss_func", None)
    if function is None or not hasattr(causal_lm, "num_experts_per_tok"):
        raise not_shareable(causal_lm, "output_router_logits")
    whole = tuple(
        shard.gather(logits.view(rows, shard.tokens, -1)).flatten(0, 1) for logits in router_logits
    )
    found: Tensor = function(whole, causal_lm.num_experts, causal_lm.num_experts_per_tok, mask)
    return found


def not_shareable(llm: PreTrainedModel, why: str) -> UserError:
    """The error for a model whose rows cannot be shared, with the reason."""
    name = type(llm).__name__
    return UserError(
        tr(
            "the rows of {name} cannot be shared by several processes, as it looks along them by "
            "its own code ({why}).",
            name=name,
            why=why,
        ),
        hint=tr(
            "set sequence_parallel_size=1; or, for a model with its own code, use its class in "
            "transformers (trust_remote_code=False) without attn_implementation."
        ),
        where=Where(key="sequence_parallel_size"),
    )


@contextlib.contextmanager
def _whole_positions(
    model: nn.Module, positions: Tensor | None, shard: SequenceShard
) -> Iterator[None]:
    """A context in which rotary embeddings that depend on a row's length are made of whole rows.

    Some (``dynamic``, ``longrope``) choose their frequencies by the largest position, and a rank's
    shard may not have it.

    Args:
        model: the model whose forward follows.
        positions: (B, S) of whole rows; None for 0, 1, 2, ...
        shard: this rank's shard.
    """

    def give_whole(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        local = named["position_ids"] if "position_ids" in named else arguments[1]
        whole = positions
        if whole is None:
            whole = torch.arange(shard.length, device=local.device)[None]
        whole = padded(whole, shard.padding, 0, 1)
        if "position_ids" in named:
            return arguments, {**named, "position_ids": whole}
        return (arguments[0], whole, *arguments[2:]), named

    def take_shard(module: nn.Module, arguments: object, outputs: Any) -> Any:
        return tuple(part[:, shard.start : shard.start + shard.tokens] for part in outputs)

    handles: list[Any] = []
    for module in model.modules():
        if depends_on_length(module):
            handles.append(module.register_forward_pre_hook(give_whole, with_kwargs=True))
            handles.append(module.register_forward_hook(take_shard))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
