"""The embedding that shares the head's weight: the same gradient, without a second weight."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from xtuner.model.backends.cpu import tied_embedding
from xtuner.model.backends.cross_entropy import FusedCrossEntropy
from xtuner.model.modules.loss import linear_cross_entropy

VOCABULARY, WIDTH = 3000, 16


def build(is_tied=True):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=is_tied,
        pad_token_id=7,
    )
    return LlamaForCausalLM(config)


def backward(model, ids):
    hidden = model.model(input_ids=ids).last_hidden_state
    linear_cross_entropy(hidden.flatten(0, 1), model.lm_head, ids.flatten().roll(-1)).backward()


@pytest.mark.parametrize("steps", [1, 2])
def test_gradients_are_those_of_torch(steps):
    ids = torch.tensor([[5, 5, 9, 2999, 7, 5], [7, 7, 0, 1, 2, 3]])  # again and again, and padding
    grads = []
    for quick in (False, True):
        model = build()
        assert not quick or tied_embedding.apply_tied_embedding(model)
        for _ in range(steps):
            backward(model, ids)
        grads.append({name: each.grad for name, each in model.named_parameters()})
    for name, theirs in grads[0].items():
        assert not grads[1][name].is_sparse
        torch.testing.assert_close(grads[1][name], theirs)


def test_no_second_weight_is_made(monkeypatch):
    """The head's gradient becomes the weight's, in its place."""
    made, of_head = [], FusedCrossEntropy.backward

    def watched(ctx, *grads):
        found = of_head(ctx, *grads)
        made.append(found[1].data_ptr())
        return found

    monkeypatch.setattr(FusedCrossEntropy, "backward", staticmethod(watched))
    model = build()
    tied_embedding.apply_tied_embedding(model)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.numel() == VOCABULARY * WIDTH:
                sizes.append(found.data_ptr())
            return found

    hidden = model.model(input_ids=torch.arange(12)[None]).last_hidden_state
    loss = linear_cross_entropy(hidden[0], model.lm_head, torch.arange(12))
    with Watch():
        loss.backward()
    assert {model.lm_head.weight.grad.data_ptr()} == set(made) == set(sizes)


def test_a_head_without_a_gradient_is_no_silent_loss():
    model = build()
    tied_embedding.apply_tied_embedding(model)
    ids = torch.arange(12)[None]
    hidden = model.model(input_ids=ids).last_hidden_state
    with pytest.raises(RuntimeError, match="head"):
        hidden.sum().backward()


def test_a_forward_without_a_backward_changes_nothing():
    ids = torch.arange(12)[None]
    model, other = build(), build()
    tied_embedding.apply_tied_embedding(model)
    model.model(input_ids=ids[:, :5])
    for each in (model, other):
        backward(each, ids)
    torch.testing.assert_close(model.lm_head.weight.grad, other.lm_head.weight.grad)


def test_others_stay_as_they_are():
    assert not tied_embedding.apply_tied_embedding(build(is_tied=False))
    model = build()
    model.model.embed_tokens.max_norm = 1.0
    assert not tied_embedding.apply_tied_embedding(model)


def test_a_frozen_embedding_needs_no_gradient():
    model = build().requires_grad_(False)
    tied_embedding.apply_tied_embedding(model)
    assert not model.model.embed_tokens(torch.tensor([[1]])).requires_grad
    assert isinstance(model.model.embed_tokens, nn.Embedding)
