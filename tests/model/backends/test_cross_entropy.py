"""The chunked loss equals the plain one, forward and backward, over shapes, heads and dtypes."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from xtuner.model.backends import cross_entropy as cross_entropy_backend
from xtuner.model.backends.cpu import cross_entropy as cpu_sizes
from xtuner.model.backends.cross_entropy import BlockSizes
from xtuner.model.backends.gpu import cross_entropy as gpu_sizes
from xtuner.model.modules import loss as loss_module
from xtuner.model.modules.loss import (
    LogitTransform,
    LossConfig,
    linear_cross_entropy,
)
from xtuner.utils import cpu

IGNORED = -100


@pytest.fixture(autouse=True, params=["kept", "again", "groups", "some kept"])
def small_blocks(request, monkeypatch):
    """Several blocks, chunks, parts and groups, odd last ones, at the tests' sizes."""
    kept = {"kept": 2**20, "again": 0, "groups": 97 * 20, "some kept": 0}[request.param]
    sizes = BlockSizes(20 * 40, 10, kept, 10 * 3, cpu.pad_to_bucket, min_rows=15)
    sizes = sizes._replace(kept_with_gradient=request.param == "some kept")
    monkeypatch.setattr(cpu_sizes, "SIZES", sizes)
    loss_module.loss_kernel.cache_clear()
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 97 * 20)
    monkeypatch.setattr(loss_module, "MIN_ROWS", 16)
    monkeypatch.setattr(cpu, "FINEST_STEP", 2)  # 53 rows are padded to 64
    yield
    loss_module.loss_kernel.cache_clear()


def plain_logits(hidden, head, rule):
    """Scaled, then capped, by the formulas of the models that do so."""
    logits = head(hidden).float() * rule.scale
    return logits if rule.softcap is None else rule.softcap * torch.tanh(logits / rule.softcap)


def plain(hidden, head, targets, rule):
    return cross_entropy(plain_logits(hidden, head, rule), targets, reduction="sum")


@pytest.mark.parametrize("count", [1, 16, 20, 53])
@pytest.mark.parametrize(
    "rule",
    [LogitTransform(), LogitTransform(scale=0.25), LogitTransform(softcap=3.0)],
    ids=["plain", "scale", "cap"],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_loss_and_gradients_equal_the_plain_ones(count, rule, frozen):
    torch.manual_seed(0)
    head = nn.Linear(24, 97, bias=False).requires_grad_(not frozen)
    hidden = torch.randn(count, 24, requires_grad=True)
    targets = torch.randint(0, 97, (count,))
    grads = []
    for compute in (linear_cross_entropy, plain):
        hidden.grad = head.weight.grad = None
        value = compute(hidden, head, targets, rule)
        (value * 0.37).backward()
        grads.append((value.detach(), hidden.grad, head.weight.grad))
    torch.testing.assert_close(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1])
    if not frozen:
        torch.testing.assert_close(grads[0][2], grads[1][2])


@pytest.mark.parametrize("count", [0, 1, 53])
@pytest.mark.parametrize("terms", [(0.1, 0.0), (0.0, 1e-2), (0.2, 1e-2)])
@pytest.mark.parametrize(
    "rule",
    [LogitTransform(), LogitTransform(scale=0.25, softcap=3.0)],
    ids=["plain", "scale_and_cap"],
)
def test_smoothed_labels_and_z_loss_equal_the_plain_ones(count, terms, rule):
    torch.manual_seed(0)
    head = nn.Linear(24, 97, bias=False)
    hidden = torch.randn(count, 24, requires_grad=True)
    targets = torch.randint(0, 97, (count,))

    def all_at_once(hidden, head, targets, rule, terms):
        logits = plain_logits(hidden, head, rule)
        smoothed = cross_entropy(logits, targets, reduction="sum", label_smoothing=terms[0])
        return smoothed + terms[1] * logits.exp().sum(-1).log().square().sum()

    found = linear_cross_entropy(hidden, head, targets, rule, LossConfig(*terms)) * 0.37
    expected = all_at_once(hidden, head, targets, rule, terms) * 0.37
    torch.testing.assert_close(found, expected)
    tensors = (hidden, head.weight)
    pairs = zip(
        torch.autograd.grad(found, tensors), torch.autograd.grad(expected, tensors), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_a_head_with_a_bias_counts_it():
    head = nn.Linear(8, 31)
    hidden, targets = torch.randn(40, 8), torch.randint(0, 31, (40,))
    expected = plain(hidden, head, targets, LogitTransform())
    torch.testing.assert_close(linear_cross_entropy(hidden, head, targets), expected)


def test_bfloat16_is_close_to_float32():
    torch.manual_seed(0)
    head = nn.Linear(32, 97, bias=False)
    hidden, targets = torch.randn(50, 32), torch.randint(0, 97, (50,))
    with torch.autocast("cpu", torch.bfloat16):
        value = linear_cross_entropy(hidden, head, targets)
    assert value.dtype is torch.float32
    torch.testing.assert_close(
        value, plain(hidden, head, targets, LogitTransform()), rtol=2e-3, atol=0
    )


def test_the_sizes_of_a_gpu_give_the_same(monkeypatch):
    torch.manual_seed(0)
    head = nn.Linear(24, 97, bias=False)
    hidden, targets = torch.randn(53, 24, requires_grad=True), torch.randint(0, 97, (53,))
    found = []
    for sizes in (cpu_sizes.SIZES, gpu_sizes.SIZES):
        value = loss_module._fused(sizes)(hidden, head, targets, LogitTransform(), LossConfig())
        found.append([value, *torch.autograd.grad(value, (hidden, head.weight))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_small_gradients_survive_float16():
    """They are scaled by the gradient scaler, after they were computed, and may be 0 until then."""
    torch.manual_seed(0)
    tokens, scale = 2000, 2.0**16
    head = nn.Linear(24, 97, bias=False).half()
    hidden = torch.randn(tokens, 24).half().requires_grad_()
    targets = torch.zeros(tokens, dtype=torch.long)
    with torch.no_grad():  # the target is all but certain: gradients of the logits are near 1e-8
        hidden[:, 0], head.weight[0] = 1.0, 0.0
        head.weight[:, 0] = -8.0
        head.weight[0, 0] = 8.0
    grads = []
    for to in (lambda t: t, lambda t: t.detach().float().requires_grad_()):
        weight, states = to(head.weight), to(hidden)
        plain_head = nn.Linear(24, 97, bias=False)
        plain_head.weight = nn.Parameter(weight.detach())
        value = linear_cross_entropy(states, plain_head, targets) * scale
        value.backward()
        grads.append((states.grad.float(), plain_head.weight.grad.float()))
    for one, other in zip(*grads, strict=True):
        assert other.norm() > 0
        assert (one - other).norm() < 0.02 * other.norm()


def test_no_token_gives_zero_that_still_has_a_gradient():
    head = nn.Linear(8, 31, bias=False)
    hidden = torch.randn(5, 8, requires_grad=True)
    value = linear_cross_entropy(hidden[:0], head, torch.empty(0, dtype=torch.long))
    value.backward()
    assert value.item() == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def test_a_target_outside_the_vocabulary_is_no_silent_zero():
    head, hidden = nn.Linear(8, 31, bias=False), torch.randn(2, 8)
    assert linear_cross_entropy(hidden, head, torch.tensor([3, 31])).isnan()


@pytest.mark.parametrize("small_blocks", ["groups"], indirect=True)
@pytest.mark.parametrize(
    ("autocast", "groups"), [(False, [18, 18, 17]), (True, [53])], ids=["float32", "cast weight"]
)
def test_logits_of_groups_are_computed_once(autocast, groups, monkeypatch):
    """With a cast of the weight for each group they are computed twice instead."""
    rows = []
    product = cross_entropy_backend._Logits._product

    def counted(logits, block):
        rows.append((len(logits.targets), block.start))
        return product(logits, block)

    monkeypatch.setattr(cross_entropy_backend._Logits, "_product", counted)
    head, hidden = nn.Linear(24, 97, bias=False), torch.randn(53, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        linear_cross_entropy(hidden, head, torch.randint(0, 97, (53,)))
    blocks = {count: {start for size, start in rows if size == count} for count in set(groups)}
    wanted = [(count, start) for count in groups for start in sorted(blocks[count])]
    assert min(map(len, blocks.values())) > 1 and rows == wanted * (2 if autocast else 1)


@pytest.mark.parametrize("small_blocks", ["some kept"], indirect=True)
@pytest.mark.parametrize("trained", [False, True])
def test_as_many_logits_are_kept_as_a_trained_weight_has_numbers(trained, monkeypatch):
    computed = []
    product = cross_entropy_backend._Logits._product

    def counted(logits, block):
        computed.append(block.start)
        return product(logits, block)

    monkeypatch.setattr(cross_entropy_backend._Logits, "_product", counted)
    head = nn.Linear(24, 97, bias=False).requires_grad_(trained)
    hidden = torch.randn(53, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(hidden, head, torch.randint(0, 97, (53,)))
    assert list(range(0, 97, 10)) == computed[:10]
    kept = 97 * 24 // (53 * 10) if trained else 0
    assert kept == (4 if trained else 0) and computed[10:] == computed[kept:10]


def test_groups_have_rows_enough_for_products_of_their_own():
    sizes = cpu_sizes.SIZES._replace(kept_logits=1000, min_rows=10)
    assert sizes.groups_of(25, 100) == [slice(0, 9), slice(9, 18), slice(18, 25)]
    assert sizes.groups_of(10, 100) == [slice(0, 10)]
    assert sizes.groups_of(25, 101) == [slice(0, 25)]  # of 9 rows
    assert sizes._replace(min_rows=0).groups_of(25, 100) == [slice(0, 25)]


def test_the_largest_tensor_is_a_block(monkeypatch):
    """Neither all logits nor a second weight is made, forward or backward."""
    monkeypatch.setattr(cpu_sizes, "SIZES", cpu_sizes.SIZES._replace(kept_logits=0))
    loss_module.loss_kernel.cache_clear()
    head, hidden = nn.Linear(8, 1000, bias=False), torch.randn(40, 8, requires_grad=True)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.untyped_storage().nbytes() > 4 * 4000:
                known = {head.weight.untyped_storage().data_ptr()}
                if made.untyped_storage().data_ptr() not in known | set(sizes):
                    sizes.append(made.untyped_storage().data_ptr())
            return made

    with Watch():
        linear_cross_entropy(hidden, head, torch.randint(0, 1000, (40,))).backward()
    assert len(sizes) == 1  # the gradient of the weight
