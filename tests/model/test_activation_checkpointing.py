"""Activation checkpointing: which layers are recomputed, from where, and that nothing changes."""

import functools

import pytest
import torch

from tests.helpers.architectures import make_architecture
from tests.helpers.tiny import make_model
from xtuner.model import SupervisedFinetune, activation_checkpointing
from xtuner.model.activation_checkpointing import (
    Checkpointing,
    enable_activation_checkpointing,
    recomputed_share,
)
from xtuner.utils.errors import UserError

IDS = torch.arange(5, 14)[None]


def gradients(llm):
    loss = llm.train()(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), [weight.grad for weight in llm.parameters()]


def test_activation_checkpointing_is_enabled_under_either_name_of_transformers(recwarn):
    llm = make_model()
    enable_activation_checkpointing(llm)
    assert all(layer.gradient_checkpointing for layer in llm.model.layers)
    assert not [each for each in recwarn if "deprecated" in str(each.message)]

    class Older:
        def gradient_checkpointing_enable(self, settings):
            self.settings = settings

    older = Older()
    enable_activation_checkpointing(older)
    assert older.settings == {"use_reentrant": False}


def test_layers_of_a_class_without_activation_checkpointing_are_recomputed():
    """Without it, and under an adapter, whose embeddings some classes change in place."""
    losses, calls = [], []
    for recomputed in (False, True):
        llm = make_architecture("ctrl", attention="eager", resid_pdrop=0.0, embd_pdrop=0.0)
        assert not llm.supports_gradient_checkpointing
        if recomputed:
            enable_activation_checkpointing(llm)
            llm.transformer.h[0].multi_head_attention.register_forward_hook(
                lambda *call: calls.append(call)
            )
        ids = torch.arange(5, 14)[None]
        loss = llm.train()(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append((loss, [weight.grad for weight in llm.parameters()]))
    assert len(calls) == 2
    torch.testing.assert_close(losses[0], losses[1])
    git = make_architecture("git", attention="eager")
    enable_activation_checkpointing(git)
    ids = torch.arange(5, 14)[None]
    git.train()(input_ids=ids, use_cache=False).logits.sum().backward()


@pytest.mark.parametrize("kind", ["llama", "ctrl"])
def test_every_second_layer_is_recomputed(kind):
    """Of a class that checkpoints itself, and of one that does not."""
    settings = {} if kind == "llama" else dict(resid_pdrop=0.0, embd_pdrop=0.0)
    make = functools.partial(make_architecture, kind, attention="eager", **settings)
    llm, calls = make(num_hidden_layers=3), []
    enable_activation_checkpointing(llm, {"every_n_layers": 2})
    layers = llm.model.layers if kind == "llama" else llm.transformer.h
    for index, layer in enumerate(layers):
        inner = layer.self_attn if kind == "llama" else layer.multi_head_attention
        inner.register_forward_hook(lambda *call, index=index: calls.append(index))
    found = gradients(llm)
    assert calls == [0, 1, 2, 2, 0]
    torch.testing.assert_close(found, gradients(make(num_hidden_layers=3)))
    if kind == "llama":
        assert recomputed_share(llm) == pytest.approx(2 / 3)


def test_the_setting_of_a_config():
    assert Checkpointing.of(True) == Checkpointing() == Checkpointing.of({"offload": False})
    assert Checkpointing.of({}) == Checkpointing()
    assert Checkpointing.of(False) is Checkpointing.of(None) is None
    found = Checkpointing.of({"every_n_layers": 4, "offload": True})
    assert found == Checkpointing(4, offload=True) and found.share == 0.25
    model = SupervisedFinetune(make_model(), use_activation_checkpointing={"every_n_layers": 2})
    flags = [layer.gradient_checkpointing for layer in model.llm.model.layers]
    assert flags == [True, False]
    wrong = {"every": 2}, {"every_n_layers": 0}, {"every_n_layers": True}, {"offload": "cpu"}
    for setting in wrong:
        with pytest.raises(UserError, match="use_activation_checkpointing"):
            Checkpointing.of(setting)


def test_classes_that_recompute_all_or_nothing_are_named(monkeypatch):
    monkeypatch.setattr(activation_checkpointing, "_checkpointed_layers", lambda model: [])
    with pytest.raises(UserError, match="all of its layers or none"):
        enable_activation_checkpointing(make_model(), {"every_n_layers": 2})
