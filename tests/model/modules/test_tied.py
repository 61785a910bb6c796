"""The embedding that shares the head's weight: the same gradient, without a second weight."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from xtuner.model.modules import tied
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
        assert not quick or tied.speed_up(model)
        for _ in range(steps):
            backward(model, ids)
        grads.append({name: each.grad for name, each in model.named_parameters()})
    for name, theirs in grads[0].items():
        assert not grads[1][name].is_sparse
        torch.testing.assert_close(grads[1][name], theirs)


def test_no_second_weight_is_made():
    ids = torch.arange(12)[None]
    counts = []
    for quick in (False, True):
        model = build()
        if quick:
            tied.speed_up(model)
        large = set()

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None, large=large):
                made = func(*args, **(kwargs or {}))
                dense = isinstance(made, torch.Tensor) and made.layout is torch.strided
                if dense and made.untyped_storage().nbytes() >= VOCABULARY * WIDTH * 4:
                    large.add(made.untyped_storage().data_ptr())
                return made

        with Watch():
            backward(model, ids)
        counts.append(len(large - {model.lm_head.weight.untyped_storage().data_ptr()}))
    assert counts == [2, 1]


def test_others_stay_as_they_are():
    assert not tied.speed_up(build(is_tied=False))
    model = build()
    model.model.embed_tokens.max_norm = 1.0
    assert not tied.speed_up(model)


def test_a_frozen_embedding_needs_no_gradient():
    model = build().requires_grad_(False)
    tied.speed_up(model)
    assert not model.model.embed_tokens(torch.tensor([[1]])).requires_grad
    assert isinstance(model.model.embed_tokens, nn.Embedding)
