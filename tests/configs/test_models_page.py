"""The table of models in the docs is current, and what it says of transformers' classes is so."""

from __future__ import annotations

import pytest

from scripts.models_page import HEAD, KINDS, ROOT, class_of, kind_of, models_of_kinds, page, tried
from tests.helpers.architectures import make_architecture
from tests.helpers.tiers import few_fast
from xtuner.model import SupervisedFinetune
from xtuner.model.modules import attention
from xtuner.model.probe import ensure_exact_rows
from xtuner.model.transformers_models.auto import FAMILIES

OF_TRANSFORMERS = [kind.model_type for kind in KINDS if kind.model_type not in FAMILIES]


@pytest.mark.parametrize("language", HEAD)
def test_the_page_is_current(language):
    written = (ROOT / "docs" / language / "models.md").read_text("utf-8")
    assert written == page(language), "run python scripts/models_page.py"


def test_every_model_has_its_row():
    assert all(models_of_kinds().values())
    assert len({kind.model_type for kind in KINDS}) == len(KINDS)
    with pytest.raises(LookupError, match="KINDS"):
        kind_of("nobody/nothing")


def test_a_row_names_the_class_and_how_it_was_tried():
    assert class_of("internlm2", "en") == "XTuner: `InternLM2ForCausalLM`"
    assert class_of("qwen3", "en") == "transformers' `Qwen3ForCausalLM`"
    assert tried("internlm2", "en") == "against the hub's code; its recipe, end to end"
    assert tried("qwen3", "en") == "packed and padded rows"


@pytest.mark.parametrize("kind", few_fast(OF_TRANSFORMERS, OF_TRANSFORMERS[::5]))
def test_samples_have_the_outputs_that_they_have_alone(kind):
    if kind == "gemma3n":
        pytest.importorskip("timm", reason="its vision tower is a model of timm")
    llm = make_architecture(kind, attention=attention.register())
    model = SupervisedFinetune(llm, use_varlen_attn=True).eval()
    ensure_exact_rows(
        model.causal_lm,
        lambda batch: model(batch, mode="tensor").logits,  # some have no body apart from the head
        packed=True,
        padded=True,
    )
