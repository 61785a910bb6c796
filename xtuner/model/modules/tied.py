"""An embedding that shares its weight with the head: its gradient as rows, on a CPU.

torch makes such an embedding's gradient as large as the weight, to add it to the head's: with a
large vocabulary that is the peak of a step. Here it has the rows of the batch's tokens only.

Shapes: V vocabulary, H width, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def speed_up(model: Any) -> bool:
    """Let a model's embedding hand back rows, where the head's gradient takes them up.

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
        if weight.device.type != "cpu" or weight.ndim != 2 or not trained:
            return self.original(ids)
        rows: Tensor = _Rows.apply(ids, weight, self.embedding.padding_idx)
        return rows


class _Rows(torch.autograd.Function):
    """Rows (..., H) of a weight (V, H) by their numbers; those of padding have no gradient."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype, ctx.padding = weight.shape, weight.dtype, padding
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (ids,) = ctx.saved_tensors
        numbers, rows = ids.flatten(), grads[0].reshape(-1, ctx.shape[1]).to(ctx.dtype)
        if ctx.padding is not None:
            taken = numbers != ctx.padding
            numbers, rows = numbers[taken], rows[taken]
        return None, torch.sparse_coo_tensor(numbers[None], rows, ctx.shape), None
