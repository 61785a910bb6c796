"""An embedding that shares its weight with the head: its gradient as rows, on a CPU.

torch makes such an embedding's gradient as large as the weight, to add it to the head's: with a
large vocabulary that is the peak of a step. Here it is the rows of the batch's tokens, which are
added to the head's gradient in its place.

Shapes: V vocabulary, H width, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def speed_up(model: Any) -> bool:
    """Let a model's embedding add its rows to the head's gradient, where one process trains.

    Args:
        model: a transformers model whose head is used in every step that is trained.

    Returns:
        Whether it does.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or embedding.weight is not getattr(head, "weight", None):
        return False
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        return False
    embedding.forward = _Forward(embedding, embedding.forward)  # type: ignore[assignment,method-assign]
    return True


class _Forward:
    """The forward of an embedding; the original where ours does not apply."""

    def __init__(self, embedding: nn.Embedding, original: Callable[..., Tensor]) -> None:
        self.embedding, self.original = embedding, original

    def __call__(self, ids: Tensor) -> Tensor:
        weight = self.embedding.weight
        trained = weight.requires_grad and torch.is_grad_enabled()
        if weight.device.type != "cpu" or not trained or torch.distributed.is_initialized():
            return self.original(ids)
        pocket = _DeferredGrad()
        pocket.hook = weight.register_hook(pocket.empty_into)
        rows: Tensor = _Rows.apply(ids, weight, self.embedding.padding_idx, pocket)
        return rows


class _DeferredGrad:
    """Holds the rows of one backward pass until the head's gradient is complete."""

    hook: Any = None
    numbers: Tensor
    rows: Tensor | None = None

    def empty_into(self, grad: Tensor | None) -> None:
        """Add the rows to the weight's gradient (V, H), in place; it is that of the head alone."""
        if self.rows is None:  # this is the backward pass of another forward
            return
        if grad is None:
            raise RuntimeError("the head, whose weight the embedding shares, had no gradient")
        grad.index_add_(0, self.numbers, self.rows.to(grad.dtype))
        self.rows = None
        self.hook.remove()


class _Rows(torch.autograd.Function):
    """Rows (..., H) of a weight (V, H) by their numbers; those of padding have no gradient."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, padding: int | None, pocket: _DeferredGrad
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.pocket = padding, pocket
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (ids,) = ctx.saved_tensors
        numbers, rows = ids.flatten(), grads[0].reshape(-1, grads[0].shape[-1])
        if ctx.padding is not None:
            taken = numbers != ctx.padding
            numbers, rows = numbers[taken], rows[taken]
        ctx.pocket.numbers, ctx.pocket.rows = numbers, rows
        return None, None, None, None  # nothing to be added: the head's gradient comes to the hook
