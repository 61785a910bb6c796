"""The measured support of architectures: the pages are the result's, and a sample still holds."""

from __future__ import annotations

import json
import random
import subprocess
from importlib.util import find_spec

import pytest
import torch

from scripts import support_page
from tests.helpers import support

COLUMNS = ("full", "packed", "padded", "lora")
SAMPLE = 3
OF_TIMM = ("fast_vlm", "gemma3n")
"""Kinds whose vision tower is a model of timm, which the suite does not install."""


def measured() -> dict[str, dict]:
    found = json.loads(support_page.RESULT.read_text("utf-8"))
    return found["architectures"]


def sample() -> list[str]:
    """Architectures that work, others for each commit."""
    git = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(git, cwd=support_page.ROOT, capture_output=True, text=True).stdout
    known = measured()
    works = [
        kind
        for kind, found in known.items()
        if all(found["cells"][name][0] == "works" for name in COLUMNS)
        and not (kind in OF_TIMM and find_spec("timm") is None)
    ]
    return random.Random(commit.strip()).sample(works, SAMPLE)


@pytest.mark.parametrize("place", range(SAMPLE))
def test_a_sample_works_as_measured(place):
    name = sample()[place]
    kind, images = (measured()[name][key] for key in ("kind", "images"))
    with support.tiny(kind, images=images) as architecture:
        for column in COLUMNS:
            cell = support.try_column(support.COLUMNS[column], architecture)
            assert cell.state == "works", f"{name}, {column}: {cell.reason}"


@pytest.mark.parametrize("language", support_page.SUMMARY)
def test_the_page_has_the_result(language):
    file = support_page.ROOT / "docs" / language / "support.md"
    written = file.read_text("utf-8")
    assert written == support_page.page(language, written), "run python scripts/support_page.py"


def test_what_differs_is_wrong():
    gradient = torch.arange(4.0)
    wanted = support.Trained(2.0, {"weight": gradient})
    support.require_same(support.Trained(2.0, {"weight": gradient.clone()}), wanted)
    for found, said in (
        (support.Trained(2.01, {"weight": gradient}), "loss off by 0.5%"),
        (support.Trained(float("nan"), {"weight": gradient}), "loss off"),
        (support.Trained(2.0, {}), "no gradient of weight"),
        (support.Trained(2.0, {"weight": gradient * 1.01}), "gradients off by 1.0%"),
        (support.Trained(2.0, {"weight": gradient, "other": gradient}), "gradients off by 100.0%"),
    ):
        with pytest.raises(support.Wrong, match=said):
            support.require_same(found, wanted)


def test_what_goes_wrong_is_the_cell():
    def fails(architecture: support.Architecture) -> None:
        raise KeyError("full_attention")

    with support.tiny("llama") as architecture:
        assert support.try_column(fails, architecture).state == "fails"
        assert support.try_column(support.padded, architecture).state == "works"
    with support.tiny("musicgen") as architecture:
        assert support.try_column(support.full, architecture).state == "untried"
