"""liger-kernel's parts are used on a GPU, where they agree; nothing else of the process changes.

Without a GPU a stand-in shows how they are put in. With liger-kernel installed and a GPU (or
TRITON_INTERPRET=1, with which 0.7.0 and 0.8.0 run) the real one is compared with transformers in
loss and gradients.
"""

import importlib.util
import logging
import os
import sys
from dataclasses import replace
from types import MethodType, ModuleType

import pytest
import torch
from peft import LoraConfig
from transformers.models.llama import modeling_llama

from tests.helpers.tiny import make_model
from xtuner.model import SupervisedFinetune
from xtuner.model.backends import environment, layers
from xtuner.model.backends.case import Case, Libraries, LibraryFunction
from xtuner.model.backends.gpu import liger

LIGER = importlib.util.find_spec("liger_kernel") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IDS = torch.arange(2, 26).view(2, 12)


class Norm(modeling_llama.LlamaRMSNorm):
    calls = 0
    scale = 1.0

    def forward(self, x):
        Norm.calls += 1
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(x.dtype) * Norm.scale


@pytest.fixture
def stand_in(monkeypatch):
    """A liger_kernel of our own that knows Llama; CPU tensors pass for a GPU's."""
    settings = []
    rotary = modeling_llama.apply_rotary_pos_emb

    def turned(q, k, cos, sin):
        turned.calls += 1
        return rotary(q, k, cos, sin)

    turned.calls = 0

    def apply(model, **chosen):
        settings.append(chosen)
        if model.config.model_type == "llama":
            modeling_llama.apply_rotary_pos_emb = turned
            modeling_llama.LlamaRMSNorm = Norm
            for module in model.modules():
                if type(module).__name__ == "LlamaRMSNorm":
                    module.forward = MethodType(Norm.forward, module)

    package, inner = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    package.__spec__ = importlib.util.spec_from_loader("liger_kernel", loader=None)
    inner._apply_liger_kernel_to_instance = apply
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inner)
    environment.function.cache_clear()
    monkeypatch.setattr(liger, "_is_on_gpu", lambda value: True)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotary)  # put back at the end
    monkeypatch.setattr(Norm, "calls", 0)
    monkeypatch.setattr(Norm, "scale", 1.0)
    yield settings, turned
    environment.function.cache_clear()


def llama(**settings):
    torch.manual_seed(0)
    return make_model(**settings).float()


def test_a_model_is_given_to_it_before_training(monkeypatch):
    """Where the layers are not compiled: compiling would join the same steps."""
    given = []
    gpu = Case("cuda", (9, 0), libraries=Libraries(liger=LibraryFunction("")))
    monkeypatch.setattr(layers, "_case", lambda compiled: replace(gpu, compiled=compiled))
    taken = replace(layers.LAYERS[1], build=lambda case: lambda model: given.append(model) or 5)
    monkeypatch.setattr(layers, "LAYERS", (layers.LAYERS[0], taken, *layers.LAYERS[2:]))
    model = SupervisedFinetune(llama(), lora=LoraConfig(r=2), use_varlen_attn=False)
    assert given == [model.causal_lm]
    assert model.backends[0].name == "liger-kernel"


def test_its_parts_compute_and_the_loss_is_ours(stand_in):
    settings, turned = stand_in
    expected = llama()(IDS).logits
    model = llama()
    kept = modeling_llama.LlamaRMSNorm
    assert liger.apply_liger(model) == 5  # two norms a layer, and the last
    assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
    assert Norm.calls == 10, "each once to be compared, and once"
    assert turned.calls == 3
    model(IDS)
    assert Norm.calls == 15
    assert modeling_llama.LlamaRMSNorm is kept, "later models are built as ever"
    assert settings[0]["fused_linear_cross_entropy"] is settings[0]["cross_entropy"] is False


def test_tensors_on_a_cpu_are_left_to_the_originals(stand_in, monkeypatch):
    _, turned = stand_in
    expected = llama()(IDS).logits
    monkeypatch.setattr(liger, "_is_on_gpu", lambda value: False)
    model = llama()
    assert liger.apply_liger(model)
    assert torch.equal(model(IDS).logits, expected)
    assert Norm.calls == turned.calls == 0


def test_what_differs_is_left_to_the_originals(stand_in, monkeypatch, caplog):
    expected = llama()(IDS).logits
    monkeypatch.setattr(Norm, "scale", 1.2)
    model = llama()
    liger.apply_liger(model)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model(IDS).logits, expected)
    assert "LlamaRMSNorm is computed without liger-kernel: its values differ" in caplog.text


def test_a_kernel_that_fails_is_left_to_the_originals(stand_in, monkeypatch, caplog):
    expected = llama()(IDS).logits
    monkeypatch.setattr(Norm, "scale", "a word")
    model = llama()
    liger.apply_liger(model)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model(IDS).logits, expected)
    assert "LlamaRMSNorm is computed without liger-kernel" in caplog.text


def test_a_second_model_of_the_process(stand_in):
    liger.apply_liger(llama())
    once = modeling_llama.apply_rotary_pos_emb
    liger.apply_liger(llama())
    assert modeling_llama.apply_rotary_pos_emb is once


def test_swiglu_is_for_silu_only(stand_in):
    settings, _ = stand_in
    for activation in ("silu", "gelu"):
        model = llama()
        model.config.hidden_act = activation
        liger.apply_liger(model)
    assert [each["swiglu"] for each in settings] == [True, False]


def test_another_version_of_it(stand_in, monkeypatch, caplog):
    monkeypatch.delattr(sys.modules["liger_kernel.transformers"], "_apply_liger_kernel_to_instance")
    with caplog.at_level(logging.INFO):
        assert liger.apply_liger(llama()) == 0
    assert "liger-kernel cannot be used" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available() and LIGER, reason="there are both")
def test_without_a_gpu_or_liger_nothing_happens():
    assert all("liger" not in each.name for each in SupervisedFinetune(llama()).backends)


@pytest.mark.skipif(not LIGER, reason="liger-kernel is not installed")
@pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="no GPU")
def test_equals_transformers(monkeypatch):
    import triton.language as tl

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setattr(liger, "_is_on_gpu", lambda value: True)
        # the interpreter has no GPU's library of functions
        monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda x: tl.rsqrt(x))
    rotary = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotary)  # put back at the end
    plain, quick = llama().to(device), llama().to(device)
    found = []
    for model in (plain, quick):
        if model is quick:
            assert liger.apply_liger(quick) == 7  # five norms, two MLPs
        ids = IDS.to(device)
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *(weight.grad for weight in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    used = [modeling_llama.apply_rotary_pos_emb, *(module.forward for module in quick.modules())]
    used = [each for each in used if isinstance(each, liger._OnGpu)]
    assert len(used) == 8
    for each in used:
        assert each.liger != each.original, f"{each.name} was found to differ"
