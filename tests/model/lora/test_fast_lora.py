"""The quick LoRA layer equals peft's own in output and gradients; what is not plain is peft's."""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.helpers.tiny import make_model
from xtuner.model.activation_checkpointing import enable_activation_checkpointing
from xtuner.model.lora import fast_lora

ODD = (3, 7, 24)  # rows, tokens, width


def adapted(base, quick, **settings):
    """Two layers, the first and the third of a model, under an adapter; sped up where asked for."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"], **settings)
    model = get_peft_model(base, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)  # zero at first: nothing could be seen
    if quick:
        assert fast_lora.apply_fused_lora(model) == 2
    return model


def layers(dtype=torch.float32, bias=True, **settings):
    """Two equal adapted models, the second one sped up."""
    made = []
    for quick in (False, True):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(24, 40, bias=bias), nn.SiLU(), nn.Linear(40, 8)).to(dtype)
        made.append(adapted(base, quick, **settings))
    return made


def outcome(model, x, autocast=None):
    """Output and gradients, of the input too."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    context = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
    torch.manual_seed(7)  # of the dropout
    with context:
        out = model(x)
    out.float().square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads and all("lora" in name for name in grads)
    return [out.detach().float(), x.grad.float(), *(g.float() for g in grads.values())]


def assert_near(first, second, bound):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert float((one - other).norm() / one.norm().clamp_min(1e-9)) < bound


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("rslora", [False, True])
def test_equals_peft_in_float32(bias, dropout, rslora, monkeypatch):
    monkeypatch.setattr(fast_lora, "dropout", nn.functional.dropout)  # the same draws
    settings = dict(bias=bias, lora_dropout=dropout, use_rslora=rslora)
    plain, quick = layers(**settings)
    x = torch.randn(ODD)
    assert_near(outcome(plain, x), outcome(quick, x), 1e-6)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_is_as_near_to_the_true_values_as_peft_in_bf16(base, dropout, monkeypatch):
    monkeypatch.setattr(fast_lora, "dropout", nn.functional.dropout)
    x = torch.randn(ODD).to(base).float()
    true = layers(lora_dropout=dropout)[0]
    plain, quick = layers(base, lora_dropout=dropout)
    for model in (true, plain, quick):  # the same weights, rounded
        for name, weight in model.named_parameters():
            if "base_layer" in name:
                weight.data = weight.data.to(torch.bfloat16).to(weight.dtype)
    if dropout == 0.0:
        assert_near(outcome(true, x), outcome(quick, x, torch.bfloat16), 0.02)
    assert_near(outcome(plain, x, torch.bfloat16), outcome(quick, x, torch.bfloat16), 0.02)


def test_the_bound_is_one_that_a_broken_path_passes_not(monkeypatch):
    plain, quick = layers()
    x = torch.randn(ODD)
    for layer in quick.modules():
        if hasattr(layer, "scaling"):
            layer.scaling["default"] *= 1.01
    with pytest.raises(AssertionError):
        assert_near(outcome(plain, x), outcome(quick, x), 1e-6)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_bias": True}], ids=["DoRA", "bias of B"]
)
def test_what_is_not_plain_is_left_to_peft(settings):
    plain, quick = layers(**settings)
    x = torch.randn(ODD)
    assert_near(outcome(plain, x), outcome(quick, x), 1e-6)


def test_a_bias_that_is_trained_gets_its_gradient():
    """It was taken to be frozen, and stayed as it was."""
    grads = []
    for model in layers():
        bias = model.base_model.model[0].base_layer.bias.requires_grad_()  # LoraConfig(bias="all")
        model(torch.ones(ODD)).square().sum().backward()
        grads.append(bias.grad)
    assert_near(grads[:1], grads[1:], 1e-6)


def test_an_output_may_be_changed_in_place():
    """As RoCBert does; autograd allows it for no view that a function of its own has made."""
    found = []
    for model in layers():
        x = torch.randn(ODD, generator=torch.Generator().manual_seed(1))
        layer = model.base_model.model[0]
        layer(x).add_(1).square().sum().backward()
        found.append([w.grad for w in layer.parameters() if w.grad is not None])
    assert_near(*found, 1e-5)


def test_adapters_that_are_off_or_merged():
    plain, quick = layers()
    x = torch.randn(ODD)
    with plain.disable_adapter(), quick.disable_adapter():
        assert torch.equal(plain(x), quick(x))
    before = quick(x)
    quick.merge_adapter()
    assert torch.allclose(quick(x), before, atol=1e-5)
    quick.unmerge_adapter()
    assert torch.allclose(quick(x), before, atol=1e-5)


def test_no_rows_and_no_gradient_for_the_input():
    _, quick = layers()
    assert quick(torch.randn(0, 5, 24)).shape == (0, 5, 8)
    quick(torch.randn(ODD)).sum().backward()
    assert all(p.grad is not None for n, p in quick.named_parameters() if "lora" in n)


class Attention(nn.Module):
    """Three layers with one input; ``calls`` says which of them are called, and whether with it."""

    def __init__(self, calls=("q", "k", "v")):
        super().__init__()
        for name, width in (("q", 24), ("k", 8), ("v", 16)):
            setattr(self, f"{name}_proj", nn.Linear(24, width, bias=name == "q"))
        self.calls = calls

    def forward(self, x):
        outs = []
        for call in self.calls:
            layer = getattr(self, f"{call[0]}_proj")
            outs.append(layer(x.clone() if call.endswith("'") else x))
        return torch.cat(outs, -1)


def attentions(calls=("q", "k", "v"), **settings):
    """Two equal adapted ones of rank 4, 6 and 4, the second one sped up."""
    made = []
    for quick in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(
            **{"r": 4, "lora_alpha": 6, "rank_pattern": {"k_proj": 6}}
            | {"target_modules": ["q_proj", "k_proj", "v_proj"]}
            | settings
        )
        model = get_peft_model(nn.Sequential(Attention(calls), nn.SiLU()), config)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.3)
        if quick:
            fast_lora.apply_fused_lora(model)
        made.append(model)
    return made


def products_made(monkeypatch):
    """Of how many layers each call of ``_LowRank`` is."""
    made = []
    apply = fast_lora._LowRank.apply
    monkeypatch.setattr(
        fast_lora._LowRank,
        "apply",
        lambda x, dropped, *parts: made.append(len(parts) // 4) or apply(x, dropped, *parts),
    )
    return made


@pytest.mark.parametrize(
    ("calls", "settings", "groups"),
    [
        (("q", "k", "v"), {}, [3, 3]),
        (("v", "q", "k"), {}, [3, 3]),
        (("q", "k", "v"), {"target_modules": ["q_proj", "v_proj"]}, [2, 2]),
        (("q", "k'", "v"), {}, [3, 1, 1, 1, 1, 1]),  # k's own input: what waited was of no use
        (("q", "v"), {}, [3, 1, 1]),  # k is never called: the second time it is left out
        (("q", "k", "v"), {"lora_dropout": 0.4}, [3, 3]),
        (("q", "k", "v", "q"), {}, [3, 3, 1, 1, 1, 1]),  # the second q was for nobody else
    ],
)
def test_layers_with_one_input_are_computed_together(calls, settings, groups, monkeypatch):
    plain, quick = attentions(calls, **settings)
    x = torch.randn(ODD)
    expected, made = outcome(plain, x), products_made(monkeypatch)
    for _ in range(2):
        found = outcome(quick, x)
        if not settings.get("lora_dropout"):  # one draw, not three
            assert_near(expected, found, 1e-6)
    assert made == groups
    if calls == ("q", "v"):
        siblings = quick.base_model.model[0].q_proj.forward.siblings
        assert siblings._input is None and not siblings._ready


def test_layers_with_one_dropout_equal_peft_with_that_dropout(monkeypatch):
    kept = torch.rand(ODD, generator=torch.Generator().manual_seed(3)) > 0.4

    def same(x, rate):
        return x * kept.to(x.dtype) / (1 - rate)

    monkeypatch.setattr(fast_lora, "dropout", same)
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: same(x, self.p))
    plain, quick = attentions(lora_dropout=0.4)
    x = torch.randn(ODD)
    made = products_made(monkeypatch)
    assert_near(outcome(plain, x), outcome(quick, x), 1e-6)
    assert made == [3]
    for layer in quick.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.3
            break  # another rate than the others': on its own
    outcome(quick, x)
    assert made[1:] == [1, 1, 1]


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_and_scales_as_torchs(rate, dtype):
    torch.manual_seed(0)
    x = torch.full((401, 503), 3.0, dtype=dtype, requires_grad=True)
    out = fast_lora.dropout(x, rate)
    out.sum().backward()
    dropped = out == 0
    assert float(dropped.float().mean()) == pytest.approx(rate, abs=0.003)
    assert torch.equal(dropped, x.grad == 0)
    if rate < 1:
        assert float(out.max()) == pytest.approx(3.0 / (1 - rate), rel=0.01)
        # elements of a row and of a column are dropped independently
        joint = (dropped[:, 1:] & dropped[:, :-1]).float().mean()
        assert float(joint) == pytest.approx(rate**2, abs=0.005)
        joint = (dropped[1:] & dropped[:-1]).float().mean()
        assert float(joint) == pytest.approx(rate**2, abs=0.005)
    torch.manual_seed(0)
    assert torch.equal(fast_lora.dropout(x, rate), out)


def test_one_dropout_for_all_layers_has_the_distribution_of_one_for_each():
    """Means and deviations of outputs over many draws: each row is one."""
    x = torch.randn(24, generator=torch.Generator().manual_seed(1)).expand(4000, 24)
    torch.manual_seed(2)
    (mean, deviation), (our_mean, our_deviation) = [
        (out.mean(0), out.std(0))
        for out in (model(x).detach() for model in attentions(lora_dropout=0.4))
    ]
    scale = deviation.max()
    assert float((mean - our_mean).abs().max() / scale) < 0.08
    assert float((deviation - our_deviation).abs().max() / scale) < 0.08


def test_a_whole_model_keeps_its_names():
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear"))
    names = list(model.state_dict())
    assert fast_lora.apply_fused_lora(model) > 4
    assert list(model.state_dict()) == names


def test_layers_stay_together_where_activations_are_computed_twice(monkeypatch):
    """Computing again stops early, and must leave nothing that waits for a layer."""
    grads, products = [], []
    linear = fast_lora.linear
    monkeypatch.setattr(
        fast_lora, "linear", lambda *given: products.append(given[1].shape) or linear(*given)
    )
    for twice in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear"))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.3)
        fast_lora.apply_fused_lora(model)
        model.train()
        if twice:
            enable_activation_checkpointing(model.get_base_model())
            model.enable_input_require_grads()
        ids = torch.arange(3, 40)[None]
        layers = model.config.num_hidden_layers
        for _ in range(2):
            model.zero_grad()
            products.clear()
            model(input_ids=ids, labels=ids).loss.backward()
            # the frozen product of a block's last layer is not computed again
            assert len(products) == 7 * layers + 6 * layers * twice
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        grads.append(list(found.values()))
        siblings = {
            id(module.forward.siblings): module.forward.siblings
            for module in model.modules()
            if isinstance(getattr(module, "forward", None), fast_lora._Forward)
        }
        sizes = [len(each.members) for each in siblings.values() if each is not None]
        assert sizes and set(sizes) == {2, 3}
        assert not any(each._ready for each in siblings.values() if each is not None)
    assert_near(*grads, 1e-5)
