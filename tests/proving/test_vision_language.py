"""Proofs of a vision-language config: they hold, and each fails when its fault is put in."""

from __future__ import annotations

import pytest
import torch

from tests.equivalence.test_image_text import CONFIG, save_rows
from tests.helpers.image_text import image_text_folder
from xtuner.config.load import load
from xtuner.config.override import override
from xtuner.model import VisionLanguageFinetune
from xtuner.proving.gradient_proofs import GradientProofs
from xtuner.proving.proof import CLAIMS
from xtuner.proving.prove import prepare
from xtuner.proving.subject import Subject

KINDS = {"adapter": ("qwen3_vl", "adapter=True"), "packed": ("gemma3", "packed=True")}


@pytest.fixture(scope="module")
def config_of(tmp_path_factory):
    """Configs of ``KINDS``, prepared when a test first needs them."""
    made = {}

    def get(name):
        if name not in made:
            kind, option = KINDS[name]
            folder = tmp_path_factory.mktemp(name)
            rows = save_rows(folder, videos=kind != "gemma3")  # which takes none
            words = [f"base={str(image_text_folder(kind))!r}", f"data_files={rows}"]
            document = override(load(CONFIG), [*words, option])
            made[name] = prepare(document, folder, full=True).config
        return made[name]

    return get


def proofs_of(config):
    return {proof.name: proof for proof in GradientProofs(Subject(config)).all()}


@pytest.mark.parametrize("name", KINDS)
def test_they_hold(config_of, name):
    found = proofs_of(config_of(name))
    assert {each.name for each in found.values() if each.state == "skipped"} == {"compiled", "gpu"}
    assert not [each for each in found.values() if each.state == "failed"]
    assert 0 < found["plain"].difference < CLAIMS["plain"].bound / 10


def test_an_image_that_is_not_seen(config_of, monkeypatch):
    """The product's model gets black images."""
    whole = VisionLanguageFinetune.inputs

    def black(self, data):
        found = whole(self, data)
        if "pixel_values" in found:
            found["pixel_values"] = torch.zeros_like(found["pixel_values"])
        return found

    monkeypatch.setattr(VisionLanguageFinetune, "inputs", black)
    found = proofs_of(config_of("packed"))
    assert found["plain"].state == "failed" and found["packed"].state == "passed"


def test_a_frozen_encoder_that_is_trained(config_of, monkeypatch):
    whole = VisionLanguageFinetune._freeze_untrained

    def nothing_frozen(self):
        whole(self)
        for name, weight in self.causal_lm.named_parameters():
            if self.parts.part_of(name) == "visual_encoder":
                weight.requires_grad_(True)

    monkeypatch.setattr(VisionLanguageFinetune, "_freeze_untrained", nothing_frozen)
    found = proofs_of(config_of("adapter"))["gradients"]
    assert found.state == "failed" and "trained, which the config does not ask for" in found.detail
