"""The optimizer wrapper and the groups of parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xtuner.engine.optim import FinetuneOptimWrapper, parameter_groups


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def wrapper(net: nn.Module, **settings) -> FinetuneOptimWrapper:
    return FinetuneOptimWrapper(torch.optim.SGD(net.parameters(), lr=0.1), **settings)


def test_groups_of_equal_settings_are_joined():
    net = model()
    net[2].bias.requires_grad_(False)
    groups = parameter_groups(
        net,
        lr=1.0,
        weight_decay=0.1,
        custom_keys={"2.": {"lr_mult": 0.1}, "2.weight": {"lr_mult": 0.5, "decay_mult": 2}},
        flat_decay_mult=0.0,
    )
    found = [(g.get("lr"), g.get("weight_decay"), len(g["params"])) for g in groups]
    assert found == [(None, None, 1), (None, 0.0, 3), (0.5, 0.2, 1)]


def test_clipping_gives_the_norm_before_it():
    net = model()
    optim = wrapper(net, clip_grad=dict(max_norm=0.5))
    optim.backward(net(torch.ones(1, 4)).sum() * 100)
    before = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    assert float(optim.clip()) == pytest.approx(float(before), rel=1e-5)
    after = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    assert float(after) == pytest.approx(0.5, rel=1e-4)


def test_without_clipping_the_norm_is_told_all_the_same():
    net = model()
    optim = wrapper(net)
    optim.backward(net(torch.ones(1, 4)).sum())
    before = [p.grad.clone() for p in net.parameters()]
    expected = torch.cat([g.flatten() for g in before]).norm()
    assert float(optim.clip()) == pytest.approx(float(expected), rel=1e-5)
    for gradient, parameter in zip(before, net.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)


def test_clipping_by_value():
    net = model()
    optim = wrapper(net, clip_grad=dict(type="value", clip_value=0.01))
    optim.backward(net(torch.ones(1, 4)).sum() * 100)
    optim.clip()
    assert max(float(p.grad.abs().max()) for p in net.parameters()) <= 0.01


def test_error_if_nonfinite_is_heeded():
    net = model()
    optim = wrapper(net, clip_grad=dict(max_norm=1, error_if_nonfinite=True))
    optim.backward(net(torch.ones(1, 4)).sum() * float("nan"))
    with pytest.raises(RuntimeError, match="non-finite"):
        optim.clip()


def test_autocast_computes_in_the_format_asked_for():
    net = model()
    for dtype, expected in (("bfloat16", torch.bfloat16), (None, torch.float32)):
        with wrapper(net, dtype=dtype).optim_context(net):
            assert net[0](torch.ones(1, 4)).dtype is expected


def test_state_comes_back():
    net = model()
    optim = FinetuneOptimWrapper(torch.optim.AdamW(net.parameters(), lr=0.1))
    optim.backward(net(torch.ones(1, 4)).sum())
    optim.step()
    other = FinetuneOptimWrapper(torch.optim.AdamW(net.parameters(), lr=0.3))
    other.load_state_dict(optim.state_dict())
    assert other.param_groups[0]["lr"] == 0.1
    assert torch.equal(
        other.optimizer.state[net[0].weight]["exp_avg"],
        optim.optimizer.state[net[0].weight]["exp_avg"],
    )


@pytest.mark.filterwarnings("ignore:User provided device_type")
@pytest.mark.parametrize("device, kept", [("cpu", True), ("cuda", False)])
def test_casts_of_weights_are_not_kept_on_a_gpu(device, kept):
    net = model()
    with wrapper(net, dtype="bfloat16", device=device).optim_context(net):
        assert torch.is_autocast_cache_enabled() is kept
    assert torch.is_autocast_cache_enabled()


def scaled_wrapper(net: nn.Module, loss_scale="dynamic", **settings) -> FinetuneOptimWrapper:
    """A wrapper with the loss scaler that fp16 on a GPU has; torch has one for CPUs as well."""
    optim = wrapper(net, loss_scale=loss_scale, **settings)
    optim.set_scaler(loss_scale, "cpu")
    return optim


def test_the_loss_scale_is_taken_out_before_clipping():
    net = model()
    loss = net(torch.ones(1, 4)).sum()
    plain = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
    optim = scaled_wrapper(net, clip_grad=dict(max_norm=0.5))
    optim.backward(net(torch.ones(1, 4)).sum())
    assert float(optim.clip()) == pytest.approx(float(plain.norm()), rel=1e-5)
    after = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(after, plain * 0.5 / plain.norm(), rtol=1e-4, atol=1e-6)


def test_a_step_that_overflowed_is_left_out_and_the_scale_falls():
    net = model()
    optim = scaled_wrapper(net, clip_grad=dict(max_norm=1, error_if_nonfinite=True))
    start = net[0].weight.detach().clone()
    optim.backward(net(torch.ones(1, 4)).sum() * 1e37)
    assert not torch.isfinite(optim.clip())
    optim.step()
    optim.zero_grad()
    assert torch.equal(net[0].weight, start)
    assert optim.state_dict()["loss_scaler"]["scale"] == 2**15
    optim.backward(net(torch.ones(1, 4)).sum())
    optim.clip()
    optim.skip_step()  # and the scaler is ready for the next one
    optim.backward(net(torch.ones(1, 4)).sum())
    assert torch.isfinite(optim.clip())
    optim.step()
    assert not torch.equal(net[0].weight, start)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ("dynamic", "dynamic", 2**15),  # as far as it had come
        (512.0, 512.0, 256),
        (512.0, 1024.0, 1024),  # changed in the config
        (512.0, "dynamic", 2**16),
        ("dynamic", dict(init_scale=8.0), 8),
    ],
)
def test_a_loss_scale_that_the_config_changes_takes_effect(before, now, expected):
    optim = scaled_wrapper(model(), before, clip_grad=dict(max_norm=1))
    optim.backward(optim.param_groups[0]["params"][0].sum() * 1e38)
    optim.clip()
    optim.step()
    other = scaled_wrapper(model(), now)
    other.load_state_dict(optim.state_dict())
    assert other.scaler.get_scale() == expected


def test_how_the_loss_scale_grows_is_up_to_the_config():
    optim = scaled_wrapper(model(), dict(growth_interval=7))
    other = scaled_wrapper(model(), dict(growth_interval=3))
    other.load_state_dict(optim.state_dict())
    assert other.scaler.get_growth_interval() == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fp16_on_a_gpu_scales_the_loss_and_leaves_out_overflows():
    net = model().cuda()
    optim = wrapper(net, dtype="float16", device="cuda", clip_grad=dict(max_norm=1))
    start = net[0].weight.detach().clone()
    with optim.optim_context(net):
        loss = net(torch.ones(1, 4, device="cuda")).sum()
    optim.backward(loss * 1e30)  # the scaled gradients overflow
    optim.clip()
    optim.step()
    optim.zero_grad()
    assert torch.equal(net[0].weight, start)
    scale = optim.state_dict()["loss_scaler"]["scale"]
    with optim.optim_context(net):
        loss = net(torch.ones(1, 4, device="cuda")).sum()
    optim.backward(loss)
    assert torch.isfinite(optim.clip())
    optim.step()
    assert not torch.equal(net[0].weight, start)
    assert scale < 2**16


def test_moments_of_another_shape_are_refused():
    """torch's fused steps would read and write beyond them."""
    weight = torch.nn.Parameter(torch.zeros(4, 2))
    wrapper = FinetuneOptimWrapper(torch.optim.AdamW([weight]))
    weight.grad = torch.ones_like(weight)
    wrapper.optimizer.step()
    state = wrapper.state_dict()
    wrapper.load_state_dict(state)
    state["state"][0]["exp_avg"] = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"exp_avg: \[1, 2\], \[4, 2\]"):
        wrapper.load_state_dict(state)
