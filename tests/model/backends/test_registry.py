"""Which backend is chosen on which machine for which case, told without the machine."""

from dataclasses import replace

import pytest
import torch

from xtuner.model.backends.case import Case, Libraries, LibraryFunction
from xtuner.model.backends.registry import Backend, choose
from xtuner.model.modules.attention import DENSE_BACKENDS, PACKED_BACKENDS, PADDED_BACKENDS
from xtuner.utils.errors import UserError

SHARED = {"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "return_aux"}
TORCH = {  # torch.nn.attention.varlen.varlen_attn of each release; before 2.10 there is none
    "2.9": LibraryFunction("not installed"),
    "2.10": LibraryFunction("", frozenset(SHARED | {"is_causal"})),
    "2.11": LibraryFunction("", frozenset(SHARED | {"scale", "window_size"})),
    "2.12": LibraryFunction("", frozenset(SHARED | {"scale", "window_size", "enable_gqa"})),
}
FLASH = LibraryFunction(
    "", frozenset({"dropout_p", "softmax_scale", "causal", "window_size", "softcap"})
)
FLASH_2_5 = LibraryFunction("", FLASH.keywords - {"softcap"})
FLASH_3 = LibraryFunction(
    "", frozenset({"softmax_scale", "causal", "window_size", "attention_chunk", "softcap"})
)
FLASH_4 = LibraryFunction(
    "", frozenset({"softmax_scale", "causal", "window_size", "learnable_sink", "softcap"})
)
FLEX = LibraryFunction("", frozenset({"score_mod", "block_mask", "scale", "enable_gqa"}))
BROKEN = LibraryFunction("undefined symbol: _ZN3c104impl3cow11cow_deleterEPv")
T4, A100, RTX3090, H100, B200, BLACKWELL = (7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)

BY_SAMPLE = "torch sdpa, sample by sample"


def on_gpu(capability, torch_version="2.12", flash_attn=None, flash=(), flex=None, **facts):
    """``flash``: versions 3 and 4 of flash-attn that are there."""
    none = LibraryFunction()
    libraries = Libraries(
        flash_attn or none,
        TORCH[torch_version],
        flash_attn_3=FLASH_3 if 3 in flash else none,
        flash_attn_4=FLASH_4 if 4 in flash else none,
        flex_attention=flex or none,
    )
    return Case("cuda", capability, libraries=libraries, **facts)


PACKED = [
    # machine, what is installed, what is computed -> the choice
    (on_gpu(H100), "torch varlen"),
    (on_gpu(A100), "torch varlen"),
    (on_gpu(BLACKWELL), "torch varlen"),
    (on_gpu(T4), BY_SAMPLE),
    (on_gpu(T4, flash_attn=FLASH, dtype=torch.float16), BY_SAMPLE),
    (on_gpu((7, 0), dtype=torch.float16), BY_SAMPLE),
    (on_gpu(H100, flash_attn=FLASH), "flash-attn"),
    (on_gpu(H100, flash_attn=BROKEN), "torch varlen"),
    # versions of flash-attn beside each other
    (on_gpu(H100, flash_attn=FLASH, flash=(3, 4)), "flash-attn 3"),
    (on_gpu(H100, flash_attn=FLASH, flash=(4,)), "flash-attn 4"),
    (on_gpu(A100, flash_attn=FLASH, flash=(3, 4)), "flash-attn"),
    (on_gpu(A100, flash=(3, 4)), "torch varlen"),
    (on_gpu(B200, flash_attn=FLASH, flash=(3, 4)), "flash-attn 4"),
    (on_gpu(BLACKWELL, flash_attn=FLASH, flash=(3, 4)), "flash-attn"),
    (on_gpu(BLACKWELL, flash=(3, 4)), "torch varlen"),
    (on_gpu(T4, flash=(3, 4)), BY_SAMPLE),
    (on_gpu(H100, flash_attn=FLASH, flash=(3, 4), dropout=True), "flash-attn"),
    (on_gpu(H100, flash_attn=FLASH, flash=(3, 4), sinks=True), "flash-attn 4"),
    (on_gpu(H100, flash_attn=FLASH, flash=(3,), softcap=True), "flash-attn 3"),
    # flex attention, for what the others lack
    (on_gpu(H100, flex=FLEX), "torch varlen"),
    (on_gpu(H100, flex=FLEX, softcap=True), "flex attention"),
    (on_gpu(H100, flash_attn=FLASH, flex=FLEX, sinks=True), "flex attention"),
    (on_gpu(H100, flash_attn=FLASH, flex=FLEX, qk_width=512, v_width=512), "flex attention"),
    (on_gpu(H100, flash_attn=FLASH, flex=FLEX, dtype=torch.float32), "flex attention"),
    (on_gpu(H100, "2.9", flex=FLEX), "flex attention"),
    (on_gpu(H100, flex=FLEX, dropout=True), BY_SAMPLE),
    (on_gpu(T4, flex=FLEX, dtype=torch.float16), BY_SAMPLE),
    (on_gpu(H100, dtype=torch.float16), "torch varlen"),
    (on_gpu(H100, dtype=torch.float32, flash_attn=FLASH), BY_SAMPLE),
    # what the kernel of each torch has
    (on_gpu(H100, "2.9"), BY_SAMPLE),
    (on_gpu(H100, "2.10"), "torch varlen"),
    (on_gpu(H100, "2.10", grouped=True), "torch varlen"),
    (on_gpu(H100, "2.10", scaled=True), BY_SAMPLE),
    (on_gpu(H100, "2.10", sliding_window=True), BY_SAMPLE),
    (on_gpu(H100, "2.10", causal=False), "torch varlen"),
    (on_gpu(H100, "2.11", scaled=True), "torch varlen"),
    (on_gpu(H100, "2.11", sliding_window=True, grouped=True), "torch varlen"),
    # heads: latent attention, wide ones, widths that are no multiple of 8
    (on_gpu(H100, qk_width=192, v_width=128), "torch varlen"),
    (on_gpu(H100, flash_attn=FLASH, qk_width=192, v_width=128), "flash-attn"),
    (on_gpu(H100, "2.10", qk_width=192, v_width=128), "torch varlen"),
    (on_gpu(H100, "2.10", qk_width=80, v_width=96), BY_SAMPLE),
    (on_gpu(H100, flash_attn=FLASH, qk_width=512, v_width=512), BY_SAMPLE),
    (on_gpu(H100, qk_width=36, v_width=36), "torch varlen"),
    (on_gpu(H100, "2.10", qk_width=36, v_width=36), BY_SAMPLE),
    (on_gpu(A100, qk_width=256, v_width=256), "torch varlen"),
    (on_gpu(RTX3090, qk_width=256, v_width=256), BY_SAMPLE),
    (on_gpu(RTX3090, flash_attn=FLASH, qk_width=256, v_width=256), "flash-attn"),
    (on_gpu(RTX3090, flash_attn=FLASH, qk_width=256, v_width=256, dropout=True), BY_SAMPLE),
    # what is done to the scores
    (on_gpu(H100, softcap=True), BY_SAMPLE),
    (on_gpu(H100, flash_attn=FLASH, softcap=True), "flash-attn"),
    (on_gpu(H100, flash_attn=FLASH_2_5, softcap=True), BY_SAMPLE),
    (on_gpu(H100, dropout=True), BY_SAMPLE),
    (on_gpu(H100, flash_attn=FLASH, dropout=True), "flash-attn"),
    (on_gpu(H100, flash_attn=FLASH, sinks=True), BY_SAMPLE),
    # CPUs
    (Case(), "CPU kernels"),
    (Case(grouped=True, scaled=True), "CPU kernels"),
    (Case(dtype=torch.float32), BY_SAMPLE),
    (Case(dtype=torch.float16), BY_SAMPLE),
    (Case(causal=False), BY_SAMPLE),
    (Case(sliding_window=True), BY_SAMPLE),
    (Case(softcap=True), BY_SAMPLE),
    (Case(sinks=True), BY_SAMPLE),
    (Case(dropout=True), BY_SAMPLE),
    (Case(qk_width=192, v_width=128), BY_SAMPLE),
    (Case("mps"), BY_SAMPLE),
]


@pytest.mark.parametrize("case, name", PACKED)
def test_packed_rows(case, name):
    assert choose(PACKED_BACKENDS, replace(case, packed=True)).name == name


DENSE = [
    (Case(), "CPU kernels"),
    (Case(cached=True, single_query=True), "torch sdpa"),
    (Case(cached=True), "blocks of queries"),
    (Case(cached=True, causal=False), "torch sdpa"),
    (Case(dtype=torch.float32), "torch sdpa"),
    (Case(qk_width=192, v_width=128), "torch sdpa"),
    (Case(dropout=True), "torch sdpa"),
    (Case(softcap=True), "blocks of queries"),
    (Case(sinks=True), "blocks of queries"),
    (Case(sliding_window=True), "blocks of queries"),
    (on_gpu(H100), "torch sdpa"),
    (on_gpu(T4, dtype=torch.float16), "torch sdpa"),
    (on_gpu(H100, softcap=True), "blocks of queries"),
]


@pytest.mark.parametrize("case, name", DENSE)
def test_rows_without_padding(case, name):
    assert choose(DENSE_BACKENDS, case).name == name


PADDED = [
    (Case(right_padded=True), "row by row"),
    (Case(), "row by row"),
    (on_gpu(H100, right_padded=True), "whole rows"),
    (on_gpu(T4, right_padded=True), "whole rows"),
    (on_gpu(H100), "row by row"),
    (on_gpu(H100, right_padded=True, causal=False), "row by row"),
    (on_gpu(H100, right_padded=True, cached=True, single_query=True), "row by row"),
]


@pytest.mark.parametrize("case, name", PADDED)
def test_rows_with_padding(case, name):
    assert choose(PADDED_BACKENDS, case).name == name


def test_the_reasons_are_those_of_the_machine():
    choice = choose(PACKED_BACKENDS, replace(on_gpu(T4, flash_attn=BROKEN), packed=True))
    assert "undefined symbol" in choice.reason
    assert "compute capability 8.0" in choice.reason
    assert "CPU" not in choice.reason
    assert choose(PACKED_BACKENDS, Case(packed=True)).reason == ""


def test_a_backend_that_fails_its_trial_is_passed_over():
    """Trials are made in order, only of backends that support the case."""
    tried = []

    def trial(backend, case):
        tried.append(backend.name)
        return "no kernel image" if backend.name.startswith("flash") else None

    case = replace(on_gpu(A100, flash_attn=FLASH, flash=(3,)), packed=True)
    choice = choose(PACKED_BACKENDS, case, trial)
    assert tried == ["flash-attn", "torch varlen"]
    assert choice.name == "torch varlen"
    assert "flash-attn: no kernel image" in choice.reason


def test_a_case_that_nothing_computes_is_refused_with_all_reasons():
    backends = [Backend("one", lambda case: "too small", lambda case: None)]
    with pytest.raises(UserError, match="one: too small"):
        choose(backends, Case())
