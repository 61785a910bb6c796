"""A kernel that fails, or computes something else, is found out on a few tokens."""

import logging

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.model.backends.gpu.test_attention import case_of, flash_attn
from xtuner.model.backends.case import Case
from xtuner.model.backends.gpu.trial import try_packed_kernel
from xtuner.model.backends.registry import Backend
from xtuner.model.backends.sdpa import attend_in_blocks
from xtuner.model.modules import attention
from xtuner.model.modules.attention import attend_by_sample

CASES = {
    "plain": Case(),
    "grouped": Case(grouped=True),
    "latent": Case(qk_width=24, v_width=16),
    "window": Case(sliding_window=True),
    "soft cap": Case(softcap=True, dtype=torch.float32),
    "sinks": Case(sinks=True, grouped=True),
    "scaled": Case(scaled=True),
    "both ways": Case(causal=False),
    "dropout": Case(dropout=True),
}


def tried(backend, case):
    return try_packed_kernel(backend, case, attend_by_sample)


def backend(kernel):
    return Backend("a kernel", lambda case: None, lambda case: kernel, device="cpu")


@pytest.mark.parametrize("case", CASES)
def test_a_right_kernel_passes(case):
    assert tried(backend(attend_by_sample), CASES[case]) is None


def ignoring(name, plain):
    """A kernel that does not know an option."""

    def kernel(query, key, value, packing, options):
        return attend_by_sample(query, key, value, packing, options._replace(**{name: plain}))

    return kernel


@pytest.mark.parametrize(
    "case, name, plain",
    [
        ("window", "sliding_window", None),
        ("soft cap", "softcap", None),
        ("sinks", "sinks", None),
        ("scaled", "scaling", None),
        ("plain", "causal", False),
        ("both ways", "causal", True),
    ],
)
def test_a_kernel_that_ignores_an_option_is_not_used(case, name, plain, caplog):
    with caplog.at_level(logging.WARNING):
        why = tried(backend(ignoring(name, plain)), CASES[case])
    assert why is not None
    assert "a kernel is not used" in caplog.text


def test_a_kernel_whose_samples_see_each_other_is_not_used():
    def whole(query, key, value, packing, options):
        return attend_in_blocks(query, key, value, options)

    assert "differ" in tried(backend(whole), CASES["plain"])


def test_a_kernel_with_a_wrong_gradient_is_not_used():
    def kernel(query, *others):
        return attend_by_sample(query.detach() + 2 * (query - query.detach()), *others)

    assert "differ" in tried(backend(kernel), CASES["plain"])


def test_a_kernel_that_fails_is_not_used():
    def kernel(*_):
        raise RuntimeError("CUDA error: no kernel image is available\nstack follows")

    why = tried(backend(kernel), CASES["plain"])
    assert why == "CUDA error: no kernel image is available"


def test_a_trial_within_a_step_leaves_no_trace():
    """Autocast, checkpointing and the random state of the step stay out of it."""
    verdicts = []

    def layer(x):
        if not verdicts:
            verdicts.append(tried(backend(attend_by_sample), CASES["dropout"]))
            verdicts.append(tried(backend(attend_by_sample), CASES["soft cap"]))
        return torch.tanh(x)

    state = torch.random.get_rng_state()
    x = torch.ones(3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert verdicts == [None, None]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_choice_is_made_once_for_a_case(monkeypatch):
    """On a GPU by trial; fields that attention does not depend on change nothing."""
    names = []
    stand_in = case_of("flash_attn", flash_attn, (4, 4, 16, 16), attention.AttentionOptions())
    monkeypatch.setattr(
        attention,
        "try_packed_kernel",
        lambda backend, case, reference: (
            names.append(backend.name) or "broken" if backend.device else None
        ),
    )
    attention._packed_choice.cache_clear()
    for compiled in (False, True):
        case = Case("cuda", (8, 0), libraries=stand_in.libraries, compiled=compiled)
        assert attention.packed_choice(case).name == "torch sdpa, sample by sample"
    assert names == ["flash-attn"]
    attention._packed_choice.cache_clear()
