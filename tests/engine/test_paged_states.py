"""bitsandbytes' optimizers: no wait for each weight, and paged states resume as paged ones."""

import pytest
import torch

from xtuner.checkpoint.io import read_torch_file
from xtuner.engine import paged_states
from xtuner.engine.optim import FinetuneOptimWrapper

optim = pytest.importorskip("bitsandbytes.optim")
STATE = "__bnb_optimizer_quant_state__"


def wrapper(kind, **settings):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (64, 128))]
    return FinetuneOptimWrapper(getattr(optim, kind)(weights, lr=0.1), **settings)


def step(wrapper, seed):
    torch.manual_seed(seed)
    for group in wrapper.param_groups:
        for weight in group["params"]:
            weight.grad = torch.randn_like(weight)
    wrapper.step()


def weights(wrapper):
    return [weight.detach().clone() for weight in wrapper.param_groups[0]["params"]]


@pytest.fixture
def pages(monkeypatch):
    """Memory that is paged, for a CPU: marked as bitsandbytes marks it."""
    made = []

    def buffer(self, weight, dtype=torch.float32):
        made.append(torch.zeros_like(weight, dtype=dtype))
        if self.is_paged:
            made[-1].is_paged = True
        return made[-1]

    module = paged_states.sys.modules[paged_states.MODULE]
    monkeypatch.setattr(module.Optimizer8bit, "get_state_buffer", buffer)
    monkeypatch.setattr(module.F, "prefetch_tensor", lambda tensor: None)
    return made


@pytest.mark.parametrize(
    "kind", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit", "PagedLion8bit"]
)
def test_states_are_saved_and_resumed(kind, pages, tmp_path):
    whole, resumed = wrapper(kind), wrapper(kind)
    for each in (whole, resumed):
        step(each, 1)
    file = tmp_path / "state.pth"
    torch.save(resumed.state_dict(), file)
    state = read_torch_file(file, mapped=False)  # weights_only
    saved = [value for each in state["state"].values() for value in each[STATE].values()]
    assert not [value for value in saved if hasattr(value, "is_paged")]
    again = wrapper(kind)
    with torch.no_grad():
        for own, other in zip(again.param_groups[0]["params"], weights(resumed), strict=True):
            own.copy_(other)
    again.load_state_dict(state)
    kept = [each[name] for each in again.optimizer.state.values() for name in ("state1",)]
    paged = kind.startswith("Paged")
    assert [getattr(value, "is_paged", None) for value in kept] == [paged or None] * 2
    for each in (whole, again):
        step(each, 2)
    assert all(map(torch.equal, weights(whole), weights(again)))
    assert "load_state_dict" not in vars(again.optimizer)


def test_a_step_does_not_wait_for_each_weight(monkeypatch):
    module = paged_states.sys.modules[paged_states.MODULE]
    waits = []
    monkeypatch.setattr(module, "sync_gpu", waits.append)
    ours = wrapper("AdamW8bit")
    step(ours, 1)
    assert not waits
    ours.optimizer.step()
    assert len(waits) == 2  # as it is without us


def test_other_optimizers_are_left_alone():
    plain = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    assert not paged_states.is_of_bitsandbytes(plain) and not paged_states.is_paged(plain)
    assert not paged_states.is_paged(wrapper("AdamW8bit").optimizer)
