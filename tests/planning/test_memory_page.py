"""``docs/*/memory.md`` has what the planner computes today."""

import pytest

from scripts import memory_page
from scripts.memory_page import MODELS, PUBLISHED, ROOT, published_row, row

PAGES = [ROOT / "docs" / language / "memory.md" for language in ("en", "zh_cn")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_all_models_are_there(page):
    text = page.read_text("utf-8")
    for model in MODELS:
        assert text.count(f"\n| {model.name} | ") >= 1, "run python scripts/memory_page.py"


def test_a_row_is_what_is_computed_today(monkeypatch):
    monkeypatch.setattr(memory_page, "LENGTHS", (2048,))
    computed = row(MODELS[0]).removesuffix(" |")  # its first half
    for page in PAGES:
        assert computed in page.read_text("utf-8"), "run python scripts/memory_page.py"


def test_the_plan_is_near_published_measurements():
    """torchtune never has the logits whole, either: its figures can be compared."""
    for each in PUBLISHED[:2]:
        line = published_row(each)
        assert line in PAGES[0].read_text("utf-8"), "run python scripts/memory_page.py"
        planned = float(line.split(" | ")[4])
        assert planned == pytest.approx(each.measured, rel=0.1)
