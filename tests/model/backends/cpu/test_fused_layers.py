"""Norms and rotary embeddings in the quick way: as exact as transformers' own, for all models."""

import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.tiers import few_fast, slow
from xtuner.model.backends.cpu import fused_layers, kernels
from xtuner.model.backends.cpu.kernels import Kernel

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
SMALL |= dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
KINDS = {  # model type -> norms and gated layers that are found, whether a rotary embedding is
    "llama": (5, 2, True),
    "qwen3": (9, 2, True),
    "gemma": (5, 0, True),  # its gate is a GELU
    "olmo2": (9, 2, True),
    "glm": (5, 0, False),  # gate and up are one layer
}


@pytest.fixture(scope="module")
def fresh():
    """Nothing is compiled before these tests, and what they compile is shared by them."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):  # else more shapes would run eagerly
        yield
    torch._dynamo.reset()


@pytest.fixture(params=[False, True], ids=["plain", "compiled"])
def untouched(request, monkeypatch, fresh):
    """Put the functions of transformers' modules back after a test."""
    monkeypatch.setattr(Kernel, "compiled", request.param)
    yield
    assert Kernel.compiled == request.param  # compiling did not fail
    for name, module in list(sys.modules.items()):
        replaced = (
            getattr(module, fused_layers.ROTARY, None) if name.startswith("transformers") else None
        )
        if isinstance(replaced, fused_layers._Rotary):
            setattr(module, fused_layers.ROTARY, replaced.original)


def build(kind):
    torch.manual_seed(0)
    extra = {"head_dim": 8} if kind in ("qwen3", "gemma", "glm") else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **extra))
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(weight, 0.7, 0.3)
    return model


def outcome(model, ids, autocast):
    """Loss and all gradients, as one vector in float64."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return torch.cat([loss.detach().view(1), *grads]).double()


@pytest.mark.parametrize("kind", few_fast(KINDS, ["qwen3", "gemma"]))
@pytest.mark.parametrize("shape", [(2, 13), slow((1, 3))])
def test_loss_and_gradients_are_as_exact_as_those_of_transformers(kind, shape, untouched):
    model = build(kind)
    ids = torch.randint(1, 64, shape)
    exact = outcome(model, ids, autocast=False)
    plain = outcome(model, ids, autocast=True)
    norms, gates, _ = fused_layers.apply_fused_layers(model)
    rotary = getattr(sys.modules[type(model).__module__], fused_layers.ROTARY, None)
    assert (norms, gates, isinstance(rotary, fused_layers._Rotary)) == KINDS[kind]
    found = outcome(model, ids, autocast=True)
    assert not torch.equal(found, plain)
    assert (found - exact).norm() <= 1.5 * (plain - exact).norm() + 1e-6
    if Kernel.compiled:  # for float32 too in test_kernels.py
        return
    found = outcome(model, ids, autocast=False)
    assert not torch.equal(found, exact)
    assert (found - exact).norm() <= 1e-5 * exact.norm()


def test_without_autocast_only_float32_is_fused(monkeypatch):
    model = build("llama").model
    assert fused_layers.apply_fused_layers(model).norms == 5
    calls = []
    function = fused_layers.rms_norm
    monkeypatch.setattr(
        fused_layers, "rms_norm", lambda *given: calls.append(given[-1]) or function(*given)
    )
    ids = torch.arange(3, 9)[None]
    model(input_ids=ids)
    assert calls == [torch.float32] * 5
    assert model.bfloat16()(input_ids=ids).last_hidden_state.dtype is torch.bfloat16
    assert len(calls) == 5


def test_a_norm_in_float32_equals_autograd():
    x = torch.randn(3, 5, 16, dtype=torch.float32, requires_grad=True)
    weight, slope = torch.randn(16, requires_grad=True), torch.randn(3, 5, 16)
    ours = fused_layers._RMSNorm.apply(x, weight, 1e-5, 1.0, torch.float32)
    theirs = nn.functional.rms_norm(x, (16,), weight + 1.0, 1e-5)
    torch.testing.assert_close(ours, theirs)
    pairs = zip(
        torch.autograd.grad(ours, (x, weight), slope),
        torch.autograd.grad(theirs, (x, weight), slope),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_other_modules_stay_as_they_are():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-5

        def forward(self, x):
            return nn.functional.layer_norm(x, (8,), self.weight, None, self.eps)

    class Swapped(Gated):
        def forward(self, x):
            return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))

    class GatedNorm(Centred):
        def forward(self, x, gate=None):
            return super().forward(x * gate.sigmoid())

    others = [nn.LayerNorm(8), Centred(), GatedNorm(), nn.Linear(4, 4)]
    others += [Gated(nn.GELU()), Swapped(nn.SiLU())]
    assert fused_layers.apply_fused_layers(nn.Sequential(*others))[:2] == (0, 0)
    with torch.device("meta"):  # as where a model is built without its weights
        assert fused_layers.apply_fused_layers(nn.Sequential(Gated(nn.SiLU())))[:2] == (0, 1)


class Plain(nn.Module):
    """An RMS norm, as in Gemma: its weight is the distance from 1."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width)), 1e-6

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:], 1 + self.weight, self.eps)


class ScaledBefore(Plain):
    """As in Muse Spark: multiplied by its weight first, then normalized."""

    def forward(self, x):
        return nn.functional.rms_norm(x * (1 + self.weight), x.shape[-1:], eps=self.eps)


class Nearly(Plain):
    """A norm of another kind that gives nearly the same."""

    def forward(self, x):
        return super().forward(x) * (1 + 0.01 * self.weight)


@pytest.mark.parametrize(("kind", "fused"), [(Plain, 1), (ScaledBefore, 0), (Nearly, 0)])
def test_a_norm_is_told_by_what_it_does_with_any_weight(kind, fused):
    """Its own weight may be the same number everywhere, as at the start of a training."""
    assert fused_layers.apply_fused_layers(nn.Sequential(kind(8))).norms == fused


class Gated(nn.Module):
    def __init__(self, act_fn):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
        self.act_fn = act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


WITHOUT_A_COMPILER = """
import torch
from xtuner.model.backends.cpu import kernels
kernels.compile_kernels()
x, weight = torch.randn(3, 8), torch.randn(8)
out, _ = kernels.rms_norm(x, weight, 1e-5, 0.0, torch.float32)
torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (8,), weight, 1e-5))
assert not kernels.Kernel.compiled
"""


@pytest.mark.slow
def test_without_a_compiler_kernels_run_as_they_are(tmp_path):
    environment = {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "compile: not compiled" in done.stderr
    assert "C++ compiler" in done.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("... -O3 -shared\nx.cpp:1:10: fatal error: Python.h: No such file", "python3-dev"),
        ("... -fopenmp\nx.h:2:10: fatal error: 'omp.h' file not found", "libomp-dev"),
        ("... ld: cannot find -lgomp: No such file or directory", "libgomp1"),
        ("InvalidCxxCompiler: No working C++ compiler found in _inductor.config", "g++"),
        ("a.cpp:3:1: error: expected ';'", "error: expected ';'"),
        ("a graph was broken", "a graph was broken"),
    ],
)
def test_what_a_compiler_lacks_is_named(error, said):
    found = kernels.explained(error)
    assert said in found and "-O3" not in found


def test_a_rotary_embedding_that_is_called_in_another_way_is_the_models_own():
    """Qwen4-Exp rotates queries alone: ``apply_rotary_pos_emb(q, cos=cos, sin=sin)``."""

    def own(q, k=None, cos=None, sin=None, unsqueeze_dim=1):
        return q * cos.unsqueeze(unsqueeze_dim) + sin.unsqueeze(unsqueeze_dim)

    q, cos, sin = torch.randn(1, 3, 2, 4), torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    found = fused_layers._Rotary(own)(q, cos=cos, sin=sin, unsqueeze_dim=2)
    assert torch.equal(found, own(q, cos=cos, sin=sin, unsqueeze_dim=2))
