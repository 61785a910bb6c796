"""Our classes compute what the hub's own code computes, packed and alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.golden_model import figures, fill, tokens
from xtuner.model.activation_checkpointing import enable_activation_checkpointing
from xtuner.model.modules import attention
from xtuner.model.transformers_models.auto import FAMILIES, AutoConfig, AutoModelForCausalLM

FOLDER = Path(__file__).parents[2] / "golden/families"
CASES = {
    f"{file.stem}-{name}": (file.stem, case)
    for file in sorted(FOLDER.glob("*.json"))
    for name, case in json.loads(file.read_text("utf-8")).items()
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_attention = pytest.mark.parametrize("implementation", ["eager", "sdpa", attention.register()])
ROWS, LENGTH, PADDING = 2, 24, 7


def build(case: tuple[str, dict[str, Any]], implementation: str) -> Any:
    model_type, entry = case
    config = AutoConfig.for_model(model_type, **json.loads(json.dumps(entry["config"])))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    fill(model)
    return model.eval()


def agree(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["gradients"].keys() == wanted["gradients"].keys()
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert found["logits"] == pytest.approx(wanted["logits"], abs=1e-5)
    for name, figure in wanted["gradients"].items():
        # the second figure is a sum with signs: its errors are those of the norm
        assert found["gradients"][name] == pytest.approx(figure, rel=1e-5, abs=1e-4 * figure[0])


def test_each_causal_family_has_figures():
    causal = {name for name, family in FAMILIES.items() if "AutoModelForCausalLM" in family.models}
    causal.remove("internvl_chat")  # a language model of another family, and image features
    assert causal <= {file.stem for file in FOLDER.glob("*.json")}


@each_attention
@each_case
def test_logits_loss_and_gradients(case, implementation):
    model = build(case, implementation)
    ids = tokens(ROWS, LENGTH, model.config.vocab_size)
    agree(figures(model, {"input_ids": ids}, ids), case[1]["plain"])


@each_attention
@each_case
def test_with_padding(case, implementation):
    model = build(case, implementation)
    ids = tokens(ROWS, LENGTH, model.config.vocab_size)
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, PADDING] = -100
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    agree(figures(model, inputs, labels), case[1]["padded"])


@each_case
def test_packed_samples_are_as_alone(case):
    model = build(case, attention.NAME)
    ids = tokens(1, 40, model.config.vocab_size)
    lengths = (11, 3, 26)  # with dynamic scaling, one is longer than the trained length
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    sides = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    sides |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    packed = model(ids, position_ids=positions, use_cache=False, **sides).logits
    packed.square().sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    parts = ids.split(lengths, dim=1)
    alone = torch.cat([model(part, use_cache=False).logits for part in parts], dim=1)
    alone.square().sum().backward()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    for name, weight in model.named_parameters():
        scale = float(weight.grad.norm())
        assert float((weight.grad - gradients[name]).norm()) <= 1e-5 * scale, name


@each_attention
@each_case
def test_generation_goes_on_as_a_whole_pass_would(case, implementation):
    model = build(case, implementation)
    fresh = 4  # the row stays within the length from which dynamic scaling begins
    row = tokens(1, 9, model.config.vocab_size)
    settings = {"max_new_tokens": fresh, "do_sample": False, "eos_token_id": -1}
    answer = model.generate(row, use_cache=True, **settings)
    assert torch.equal(answer, model.generate(row, use_cache=False, **settings))
    for _ in range(fresh):
        row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(answer, row)


@each_case
def test_checkpointing_gives_the_same_gradients(case):
    model = build(case, "sdpa").train()
    ids = tokens(ROWS, LENGTH, model.config.vocab_size)
    wanted = figures(model, {"input_ids": ids, "use_cache": False}, ids)
    enable_activation_checkpointing(model)
    agree(figures(model, {"input_ids": ids, "use_cache": False}, ids), wanted)
