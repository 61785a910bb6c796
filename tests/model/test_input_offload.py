"""Inputs of layers in main memory: gradients are the same, whenever copies are done."""

import functools
import gc

import pytest
import torch

from tests.helpers.architectures import make_architecture
from xtuner.model import activation_checkpointing, input_offload
from xtuner.model.activation_checkpointing import enable_activation_checkpointing
from xtuner.model.input_offload import InputOffload, KeptInput, PinnedMemory

LAYERS = 5
KINDS = {"llama": {}, "ctrl": dict(resid_pdrop=0.0, embd_pdrop=0.0)}
"""A class that checkpoints itself, and one that does not."""


class LateStream:
    """Does its work as late as it is allowed to: when it is waited for."""

    def __init__(self, device=None):
        self.waiting, self.done = [], 0

    def run(self, work):
        self.waiting.append(work)
        return self.done + len(self.waiting)

    def wait(self, mark):
        while self.done < mark:
            self.waiting.pop(0)()
            self.done += 1


@pytest.fixture
def on_gpu(monkeypatch):
    """A CPU that is taken for a GPU: its streams, and how many inputs it had at a time."""
    streams, counts = [], []

    def stream(device):
        streams.append(LateStream())
        return streams[-1]

    def count():
        kept = [each for each in gc.get_objects() if type(each) is KeptInput]
        counts.append((sum(each._on_gpu is not None for each in kept), len(kept)))

    for name in ("get", "__init__"):
        whole = getattr(KeptInput, name)

        @functools.wraps(whole)
        def counted(*args, whole=whole, **kwargs):
            found = whole(*args, **kwargs)
            count()
            return found

        monkeypatch.setattr(KeptInput, name, counted)
    offload = functools.partial(InputOffload, stream)
    monkeypatch.setattr(activation_checkpointing, "InputOffload", offload)
    monkeypatch.setattr(input_offload.environment, "waits_for", lambda device: True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # memory that nothing was copied into is NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield streams, counts
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def model(kind, **settings):
    return make_architecture(
        kind, attention="eager", num_hidden_layers=LAYERS, **KINDS[kind], **settings
    ).train()


def gradients(llm, lengths=(9,), backward=1):
    """Of several micro-batches."""
    llm.zero_grad()
    for length in lengths:
        ids = torch.arange(5, 5 + length)[None]
        loss = llm(input_ids=ids, labels=ids, use_cache=False).loss
        for number in range(backward):
            loss.backward(retain_graph=number < backward - 1)
    return [weight.grad.clone() for weight in llm.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same(kind, on_gpu):
    streams, _ = on_gpu
    for lengths, backward in (((9,), 1), ((9, 14, 5, 14), 1), ((9, 6), 2)):
        wanted = gradients(model(kind), lengths, backward)
        llm = model(kind)
        enable_activation_checkpointing(llm, {"offload": True})
        torch.testing.assert_close(gradients(llm, lengths, backward), wanted)
    assert len(streams) == 3 and all(stream.done for stream in streams)
    assert not [each for each in gc.get_objects() if type(each) is KeptInput]


def test_few_inputs_are_on_the_gpu_and_main_memory_is_used_again(on_gpu, monkeypatch):
    """The one in use, and that of the layer before or after it."""
    _, counts = on_gpu
    taken = []
    monkeypatch.setattr(PinnedMemory, "take", recording(PinnedMemory.take, taken))
    llm = model("llama")
    enable_activation_checkpointing(llm, {"offload": True})
    gradients(llm, (9, 9, 9))
    assert max(on_gpu for on_gpu, _ in counts) == 1
    assert max(kept for _, kept in counts) == LAYERS
    assert len(taken) == 3 * LAYERS and len({each.data_ptr() for each in taken}) == LAYERS


def recording(function, found):
    def call(*args):
        found.append(function(*args))
        return found[-1]

    return call


def test_an_input_comes_while_the_layer_after_it_is_computed(on_gpu):
    """It is asked for before that layer, and waited for after it."""
    streams, _ = on_gpu
    llm = model("llama")
    enable_activation_checkpointing(llm, {"offload": True})
    seen = []
    for index, layer in enumerate(llm.model.layers):
        layer.self_attn.register_forward_hook(
            lambda *_, index=index: seen.append((index, len(streams[0].waiting)))
        )
    gradients(llm)
    there, back = seen[:LAYERS], seen[LAYERS:]
    assert there == [(index, 1) for index in range(LAYERS)]  # its own copy is not waited for
    # the copy of the last layer's own input is for nothing: it is still on the GPU
    assert back == [(4, 1), (3, 1), (2, 1), (1, 1), (0, 0)]


def test_where_no_gpu_is_nothing_is_copied(monkeypatch):
    monkeypatch.setattr(KeptInput, "__init__", None)
    llm = model("llama")
    enable_activation_checkpointing(llm, {"offload": True})
    torch.testing.assert_close(gradients(llm), gradients(model("llama")))


def test_a_graph_that_is_thrown_away_leaves_nothing(on_gpu):
    streams, _ = on_gpu
    llm = model("llama")
    enable_activation_checkpointing(llm, {"offload": True})
    ids = torch.arange(5, 14)[None]
    llm(input_ids=ids, labels=ids, use_cache=False)
    assert not [each for each in gc.get_objects() if type(each) is KeptInput]
    assert not streams[0].waiting  # memory that a copy still reads is not given away


def test_several_inputs_of_a_layer_move_together(on_gpu):
    """None of them is waited for before the layer is computed."""
    streams, _ = on_gpu
    waiting = []

    def layer(a, b):
        waiting.append(len(streams[0].waiting))
        return a * b, a + b

    checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    call = activation_checkpointing.InputOffload().around(checkpoint)
    found, wanted = (torch.arange(1.0, 4.0).requires_grad_() for _ in range(2))
    sum(call(layer, *call(layer, found * 1, found + 1))).sum().backward()
    assert waiting[:2] == [2, 2]
    a, b = wanted * (wanted + 1), wanted + wanted + 1
    (a * b + a + b).sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad)


def test_buffers_that_are_too_small_are_let_go():
    memory = PinnedMemory()
    small, other = memory.take(10), memory.take(10)
    memory.free += [small, other]
    large = memory.take(30)
    assert large.numel() == 30 and len(memory.free) == 1
    memory.free.append(large)
    assert memory.take(5).numel() == 10 and memory.take(5).numel() == 30
    assert memory.take(5).numel() == 30  # as large as any may become
