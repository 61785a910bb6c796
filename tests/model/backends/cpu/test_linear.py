"""Large linear layers that are trained: as exact as torch's own, in loss and gradients."""

import pytest
import torch
from torch import nn

from xtuner.model.backends.cpu import linear
from xtuner.model.backends.cpu.kernels import Kernel


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(linear, "LARGE", 12 * 20)
    monkeypatch.setattr(Kernel, "compiled", True)


@pytest.mark.parametrize("shape", [(1, 20), (2, 13, 20), (0, 20)])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_as_exact_as_those_of_torch(shape, bias):
    torch.manual_seed(0)
    layer = nn.Linear(20, 12, bias=bias)
    x, slope = torch.randn(*shape, requires_grad=True), torch.randn(*shape[:-1], 12)
    tensors = (x, *layer.parameters())

    def outcome(autocast=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(x)
        return out, *torch.autograd.grad(out, tensors, slope.to(out.dtype))

    exact, plain = outcome(autocast=False), outcome()
    assert linear.apply_fused_linear(layer) == 1
    for one, other, true in zip(outcome(), plain, exact, strict=True):
        assert one.dtype == other.dtype
        assert one.is_contiguous()
        assert (one - true).norm() <= 1.2 * (other - true).norm() + 1e-6
    for one, true in zip(outcome(autocast=False), exact, strict=True):
        assert torch.equal(one, true)
    assert Kernel.compiled


def test_frozen_small_and_other_layers_stay_as_they_are():
    class Own(nn.Linear):
        pass

    layers = [nn.Linear(20, 12).requires_grad_(False), nn.Linear(11, 20), Own(20, 12)]
    assert (
        linear.apply_fused_linear(nn.Sequential(*layers, nn.Linear(20, 200), nn.Linear(20, 160)))
        == 1
    )


def test_a_layer_frozen_later_needs_no_gradient():
    layer = nn.Linear(20, 12)
    linear.apply_fused_linear(layer)
    layer.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert not layer(torch.randn(3, 20)).requires_grad


def test_without_compiled_kernels_torch_computes(monkeypatch):
    monkeypatch.setattr(Kernel, "compiled", False)
    layer = nn.Linear(20, 12)
    linear.apply_fused_linear(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert type(layer(torch.randn(3, 20)).grad_fn).__name__ == "AddmmBackward0"
