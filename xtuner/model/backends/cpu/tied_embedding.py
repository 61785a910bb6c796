"""The gradient of an embedding that shares its weight with the head, on a CPU.

torch computes the embedding's gradient as a dense tensor of the size of the weight and adds it to
that of the head: with a large vocabulary that is the peak memory of a step. Here only the rows of
the batch's tokens are kept, and added to the head's gradient in place.

Shapes: V vocabulary, H width, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xtuner.utils.types import AutogradContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_tied_embedding(model: PreTrainedModel) -> int:
    """Replace the forward of an embedding that shares its weight with the head.

    Args:
        model: a transformers model whose head is called in every training step.

    Returns:
        How many embeddings were replaced, 0 or 1.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or embedding.weight is not getattr(head, "weight", None):
        return 0
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        return 0
    embedding.forward = _Forward(embedding, embedding.forward)  # type: ignore[assignment,method-assign]
    return 1


class _Forward:
    """The forward of an embedding, or the original where that does not apply."""

    def __init__(self, embedding: nn.Embedding, original: Callable[..., Tensor]) -> None:
        self.embedding, self.original = embedding, original

    def __call__(self, ids: Tensor) -> Tensor:
        weight = self.embedding.weight
        trained = weight.requires_grad and torch.is_grad_enabled()
        if weight.device.type != "cpu" or not trained or torch.distributed.is_initialized():
            return self.original(ids)
        deferred = _DeferredGrad()
        deferred.hook = weight.register_hook(deferred.add_to)
        rows: Tensor = _Rows.apply(ids, weight, self.embedding.padding_idx, deferred)
        return rows


class _DeferredGrad:
    """Holds the rows of one backward pass until the head's gradient is complete."""

    hook: Any = None
    token_ids: Tensor
    rows: Tensor | None = None

    def add_to(self, grad: Tensor | None) -> None:
        """Add the rows to the weight's gradient (V, H), in place; it is that of the head alone."""
        if self.rows is None:  # this is the backward pass of another forward
            return
        if grad is None:
            raise RuntimeError("the head, whose weight the embedding shares, had no gradient")
        grad.index_add_(0, self.token_ids, self.rows.to(grad.dtype))
        self.rows = None
        self.hook.remove()


class _Rows(torch.autograd.Function):
    """Rows (..., H) of a weight (V, H) by token id; those of padding have no gradient."""

    @staticmethod
    def forward(
        ctx: AutogradContext,
        ids: Tensor,
        weight: Tensor,
        padding: int | None,
        deferred: _DeferredGrad,
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.deferred = padding, deferred
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        token_ids, rows = ids.flatten(), grads[0].reshape(-1, grads[0].shape[-1])
        if ctx.padding is not None:
            taken = token_ids != ctx.padding
            token_ids, rows = token_ids[taken], rows[taken]
        ctx.deferred.token_ids, ctx.deferred.rows = token_ids, rows
        return None, None, None, None  # the hook adds the rows to the head's gradient
