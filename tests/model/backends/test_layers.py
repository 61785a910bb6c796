"""The fast paths of this CPU are taken, by what is in the graph of a step, and the report says so.

A fast path that does not recognize a module falls back without an error: without these tests a
change in transformers or peft would only be seen as a slow run.
"""

import pytest
import torch
from peft import LoraConfig

from tests.helpers.tiers import slow
from tests.helpers.tiny import make_model
from xtuner.model import DPO, SupervisedFinetune
from xtuner.model.backends.cpu.kernels import Kernel
from xtuner.model.modules import attention

KINDS = {
    "attention": "_AttentionBackward",
    "norms": "_RMSNormBackward",
    "rotary embedding": "_RoPEBackward",
    "MLP": "_SwiGLUBackward",
    "loss": "FusedCrossEntropyBackward",
}
BATCH = {
    "input_ids": torch.arange(3, 43)[None],
    "labels": torch.arange(3, 43)[None],
    "position_ids": torch.cat([torch.arange(25), torch.arange(15)])[None],
    "cumulative_len": [torch.tensor([0, 25, 40], dtype=torch.int32)],
    "max_seqlen": 25,
}


def build(lora=None, model_type="llama", dtype=torch.float32, **settings):
    torch.manual_seed(0)
    llm = make_model(model_type, **settings).to(dtype)
    llm.set_attn_implementation(attention.register())
    return SupervisedFinetune(
        llm, lora=lora, use_varlen_attn=True, use_activation_checkpointing=False
    )


def functions(tensor):
    """The names of all autograd functions that a tensor was computed by, each as often as it is."""
    found, seen, waiting = [], set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.append(type(node).__name__)
        waiting += [each for each, _ in node.next_functions]
    return found


def step(model, enabled=True):
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        return functions(model(BATCH)["loss"])


@pytest.fixture(params=[False, slow(True)], ids=["plain", "compiled"])
def compiled(request, monkeypatch):
    monkeypatch.setattr(Kernel, "compiled", request.param)
    return request.param


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_every_part_of_a_layer_is_fused(model_type):
    found = step(build(model_type=model_type))
    layers = 2
    counts = {kind: found.count(name) for kind, name in KINDS.items()}
    norms = 4 * layers + 1 if model_type == "qwen3" else 2 * layers + 1
    rotary = 2 * layers  # queries and keys
    assert counts == {
        "attention": layers,
        "norms": norms,
        "rotary embedding": rotary,
        "MLP": layers,
        "loss": 1,
    }


def test_a_rotary_embedding_of_a_part_of_each_head_is_fused():
    found = step(build(model_type="phi3", partial_rotary_factor=0.5))
    assert found.count("_RoPEBackward") == 4


def test_in_float32_everything_but_attention_is():
    found = step(build(), enabled=False)
    missing = [kind for kind, name in KINDS.items() if name not in found]
    assert missing == ["attention"]


def test_lora_layers_are_fused_together():
    found = step(build(LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")))
    # of a layer: query, key, value; output; gate, up; down
    assert found.count("_LowRankBackward") == 2 * 4
    report = {concept: name for concept, name, _ in build(LoraConfig(r=2)).backends_report()}
    assert report["LoRA"] == "fused"


def test_large_linear_layers_are_fused_in_compiled_runs(compiled, monkeypatch):
    from xtuner.model.backends.cpu import linear

    monkeypatch.setattr(linear, "LARGE", 1)
    monkeypatch.setattr(linear, "transpose_contiguous", linear.transpose_contiguous.plain)
    model = build()
    found = step(model)
    assert ("_LinearBackward" in found) == compiled
    report = {concept: line for concept, *line in model.backends_report(torch.bfloat16)}
    if compiled:
        assert report["linear layers"] == ["CPU kernels", ""]
    else:
        assert report["linear layers"] == ["torch", "CPU kernels: kernels are not compiled"]


def test_the_report_of_a_run_in_bfloat16():
    model = build(tie_word_embeddings=True)
    report = {concept: line for concept, *line in model.backends_report(torch.bfloat16)}
    assert report.pop("linear layers")[0] == "torch"  # too small
    assert report == {
        "attention": ["CPU kernels", ""],
        "loss": ["fused linear cross-entropy", ""],
        "norms, rotary embedding, MLP": ["CPU kernels", ""],
        "tied embedding": ["CPU kernels", ""],
    }


def test_the_report_says_why_a_fast_path_is_not_taken():
    model = build(
        model_type="gemma2",
        layer_types=["sliding_attention", "full_attention"],
        attn_logit_softcapping=None,
    )
    report = {concept: line for concept, *line in model.backends_report(torch.bfloat16)}
    assert report["attention"] == ["CPU kernels", ""]
    assert report["attention, sliding window"] == [
        "torch sdpa, sample by sample",
        "CPU kernels: it is for causal attention alone",
    ]
    report = {concept: line for concept, *line in model.backends_report(torch.float32)}
    assert report["norms, rotary embedding, MLP"] == ["CPU kernels", ""]
    assert report["attention"] == [
        "torch sdpa, sample by sample",
        "CPU kernels: it is for bfloat16",
    ]


def test_the_report_of_a_head_with_an_adapter_and_of_another_attention():
    lora = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = build(lora)
    model.llm.get_base_model().set_attn_implementation("eager")
    report = {concept: line for concept, *line in model.backends_report(torch.bfloat16)}
    assert report["attention"] == ["eager", "attn_implementation of the config"]
    assert report["loss"][0] == "cross-entropy in chunks"
    model._separate_head = False
    report = {concept: line for concept, *line in model.backends_report(torch.bfloat16)}
    assert report["loss"][0] == "cross-entropy of all logits"


def test_models_of_preferences_have_a_report(tiny_llama):
    model = DPO(make_model(), lora=LoraConfig(r=2, task_type="CAUSAL_LM"))
    concepts = [concept for concept, *_ in model.backends_report(torch.bfloat16)]
    assert {"attention", "loss", "LoRA"} <= set(concepts)
