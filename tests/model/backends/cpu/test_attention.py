"""The parts of attention on a CPU that tests/model/modules/test_attention.py sees as a whole."""

import pytest
import torch

from xtuner.model.backends.cpu import attention as cpu
from xtuner.model.backends.cpu.kernels import Kernel
from xtuner.model.backends.interfaces import AttentionOptions, Packing


def row(rows, tokens, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return [torch.randn(rows, count, tokens, 16, dtype=dtype) for count in (4, 2, 2)]


def test_rows_are_samples_of_one_packed_row():
    query, key, value = row(3, 20)
    found = cpu._attend_rows(query, key, value, AttentionOptions())
    joined = [t.transpose(0, 1).flatten(1, 2)[None] for t in (query, key, value)]
    packing = Packing(torch.tensor([0, 20, 40, 60]), 20)
    assert torch.equal(
        found.flatten(0, 1)[None], cpu._attend_packed(*joined, packing, AttentionOptions())
    )


def test_the_scale_is_that_of_the_width_or_the_one_given():
    query, key, value = row(1, 20)
    own = cpu.attend(query, key, value, [20], None)
    assert torch.equal(own, cpu.attend(query, key, value, [20], 16**-0.5))
    assert not torch.equal(own, cpu.attend(query, key, value, [20], 1.0))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_sample_has_no_gradient_from_another(compiled, monkeypatch):
    monkeypatch.setattr(Kernel, "compiled", compiled)
    tensors = [t.requires_grad_() for t in row(1, 20)]
    out = cpu.attend(*tensors, [8, 0, 12], None)
    grads = torch.autograd.grad(out[:, :8].float().sum(), tensors)
    for grad in grads:
        assert grad[:, :, :8].any()
        assert not grad[:, :, 8:].any()
