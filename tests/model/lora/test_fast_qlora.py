"""The quick LoRA layer over 4 bits equals peft's and bitsandbytes' own in output and gradients."""

import copy
import gc
import itertools

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig
from torch import nn

from tests.model.lora.test_fast_lora import ODD, adapted, assert_near, outcome
from xtuner.model.lora import fast_lora

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def make(quick, compute=F32, quant="nf4", double=True, bias=True, **lora):
    """Two layers in 4 bits under an adapter; the same ones each time."""
    torch.manual_seed(0)
    kind = dict(compute_dtype=compute, quant_type=quant, compress_statistics=double)
    first, last = (bnb.nn.Linear4bit(*shape, bias=bias, **kind) for shape in ((24, 40), (40, 7)))
    base = nn.Sequential(first, nn.SiLU(), last).to("cpu")  # which quantises
    for layer in (first, last):
        layer.support_avx512bf16_for_cpu = False  # as model/loading.py has it
    base.is_loaded_in_4bit = True  # as transformers marks it for peft
    return adapted(base, quick, **lora)


def both(**settings):
    return make(False, **settings), make(True, **settings)


@pytest.fixture(autouse=True)
def the_same_draws(monkeypatch):
    """Dropout as peft draws it, so that both can be compared."""
    monkeypatch.setattr(fast_lora, "dropout", nn.functional.dropout)


@pytest.fixture
def of_peft(monkeypatch):
    """Counts the forwards that the quick layers leave to peft."""
    from peft.tuners.lora.bnb import Linear4bit

    calls = []
    original = Linear4bit.forward

    def counted(self, *args, **kwargs):
        calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Linear4bit, "forward", counted)
    return calls


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_equals_peft_in_float32(quant, double, bias, dropout, of_peft):
    settings = dict(quant=quant, double=double, bias=bias, lora_dropout=dropout)
    plain, quick = both(**settings)
    x = torch.randn(ODD)
    theirs = outcome(plain, x)
    assert len(of_peft) == 2
    assert_near(theirs, outcome(quick, x), 1e-6)
    assert len(of_peft) == 2


@pytest.mark.parametrize("compute", [F32, BF16, None])
@pytest.mark.parametrize("given", [F32, BF16])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_equals_peft_under_autocast(compute, given, dropout, of_peft):
    plain, quick = both(compute=compute, lora_dropout=dropout)
    x = torch.randn(ODD).to(given)
    theirs = outcome(plain, x, BF16)
    assert_near(theirs, outcome(quick, x, BF16), 0.02)
    if compute is not None or given is F32:
        assert len(of_peft) == 2
    with torch.autocast("cpu", BF16):
        assert plain(x).dtype == quick(x).dtype == given


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_equals_peft_in_bf16_throughout(dropout, of_peft):
    plain, quick = (model.to(BF16) for model in both(compute=BF16, lora_dropout=dropout))
    x = torch.randn(ODD).to(BF16)
    assert_near(outcome(plain, x), outcome(quick, x), 0.02)
    assert len(of_peft) == 2


def test_the_bound_is_one_that_a_broken_path_passes_not(monkeypatch):
    plain, quick = both()
    x = torch.randn(ODD)
    theirs = outcome(plain, x)
    original = fast_lora._dequantized

    def coarse(weight, state, dtype):  # the doubly quantised scales are taken without their mean
        broken = copy.copy(state)
        broken.offset = state.offset * 0.99
        return original(weight, broken, dtype)

    monkeypatch.setattr(fast_lora, "_dequantized", coarse)
    with pytest.raises(AssertionError):
        assert_near(theirs, outcome(quick, x), 1e-6)


def test_only_the_backward_is_broken(monkeypatch):
    plain, quick = both()
    x, calls = torch.randn(ODD), itertools.count()
    theirs = outcome(plain, x)
    original = fast_lora._dequantized

    def late(weight, state, dtype):
        whole = original(weight, state, dtype)
        return whole if next(calls) < 2 else whole * 1.001

    monkeypatch.setattr(fast_lora, "_dequantized", late)
    with pytest.raises(AssertionError):
        assert_near(theirs, outcome(quick, x), 1e-6)
    assert next(calls) == 4, "each weight is dequantized once a direction"


def test_nothing_whole_is_kept_for_the_backward():
    quick = make(True)
    out = quick(torch.randn(ODD))
    gc.collect()
    held = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        quick(torch.randn(ODD))
    for tensor in (*held, *saved):
        assert not (tensor.is_floating_point() and tensor.shape in {(40, 24), (7, 40)})
    assert any(tensor.dtype == torch.uint8 for tensor in saved)
    out.sum().backward()


@pytest.mark.parametrize(
    ("settings", "given", "autocast"),
    [
        ({"use_dora": True}, F32, None),
        ({"lora_bias": True}, F32, None),
        ({"compute": BF16}, F32, None),
        ({"compute": F16}, F32, BF16),
    ],
    ids=["DoRA", "bias of B", "product in bf16 within float32", "two half formats"],
)
def test_what_is_not_plain_is_left_to_peft(settings, given, autocast, of_peft):
    plain, quick = both(**settings)
    x = torch.randn(ODD).to(given)
    assert_near(outcome(plain, x, autocast), outcome(quick, x, autocast), 1e-9)
    assert len(of_peft) == 4


def test_two_adapters_at_once_are_left_to_peft(of_peft):
    plain, quick = both()
    for model in (plain, quick):
        torch.manual_seed(1)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "2"]))
        model.base_model.set_adapter(["default", "other"])
    x = torch.randn(ODD)
    assert torch.equal(plain(x), quick(x))
    assert len(of_peft) == 4


def test_a_layer_that_was_repacked_is_left_to_bitsandbytes(of_peft):
    quick = make(True)
    layer = quick.base_model.model[0].base_layer
    layer.weight.quant_state.packing_format_for_cpu = True
    assert fast_lora._state_of_4bits(layer) is None


def test_an_adapter_that_is_off():
    plain, quick = both()
    x = torch.randn(ODD)
    with plain.disable_adapter(), quick.disable_adapter():
        assert torch.equal(plain(x), quick(x))


def test_no_rows():
    assert make(True)(torch.randn(0, 5, 24)).shape == (0, 5, 7)
