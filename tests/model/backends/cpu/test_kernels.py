"""Each element-wise kernel equals plain torch, forward and backward, eager and compiled."""

import pytest
import torch
from torch.nn.functional import silu

from xtuner.model.backends.cpu import kernels
from xtuner.model.backends.cpu.kernels import Kernel


@pytest.fixture(autouse=True, params=[False, True], ids=["plain", "compiled"])
def compiled(request, monkeypatch):
    monkeypatch.setattr(Kernel, "compiled", request.param)
    torch.manual_seed(0)
    yield
    assert Kernel.compiled == request.param  # compiling did not fail


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset):
    x = torch.randn(5, 16, requires_grad=True)
    weight, grad = torch.randn(16, requires_grad=True), torch.randn(5, 16)
    wanted = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (weight + offset)
    with torch.no_grad():
        found, inverse = kernels.rms_norm(x, weight, 1e-5, offset, torch.float32)
        grads = kernels.rms_norm_backward(grad, x, weight, inverse, offset, True)
        assert kernels.rms_norm_backward(grad, x, weight, inverse, offset, False)[1] is None
    torch.testing.assert_close(found, wanted)
    for one, other in zip(grads, torch.autograd.grad(wanted, (x, weight), grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rotated", [8, 4])
def test_apply_rope(rotated):
    """As a product of complex numbers; what is behind the rotated part stays."""
    x, angles = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, rotated // 2)
    both = torch.cat((angles, angles), -1)
    found = kernels.apply_rope(x, both.cos(), both.sin(), torch.float32)
    half = rotated // 2
    turned = torch.complex(x[..., :half], x[..., half:rotated]) * torch.polar(
        torch.ones_like(angles), angles
    )
    wanted = torch.cat((turned.real, turned.imag, x[..., rotated:]), -1)
    torch.testing.assert_close(found, wanted)


def test_swiglu():
    gate, up = torch.randn(2, 5, 8, requires_grad=True).unbind()
    grad = torch.randn(5, 8)
    wanted = silu(gate) * up
    with torch.no_grad():
        torch.testing.assert_close(kernels.swiglu(gate, up), wanted)
        grads = kernels.swiglu_backward(grad, gate, up)
    for one, other in zip(grads, torch.autograd.grad(wanted, (gate, up), grad), strict=True):
        torch.testing.assert_close(one, other)


def test_softmax_backward():
    products, values = torch.randn(2, 5, 5, requires_grad=True), torch.randn(2, 5, 3)
    grad = torch.randn(2, 5, 3)
    scale = 0.7
    weights = (products * scale).softmax(-1)
    (wanted,) = torch.autograd.grad(weights @ values, products, grad)
    with torch.no_grad():
        found, grad_weights = products.clone(), grad @ values.mT
        lse = (products * scale).logsumexp(-1, keepdim=True)
        dot = kernels.rowwise_dot(grad, weights @ values)[..., None]
        kernels.softmax_backward(found, grad_weights, lse, dot, scale)
    torch.testing.assert_close(found, weights)
    torch.testing.assert_close(grad_weights, wanted)


def test_transpose_contiguous():
    matrix = torch.randn(3, 5)
    found = kernels.transpose_contiguous(matrix)
    assert found.is_contiguous()
    assert torch.equal(found, matrix.T)
