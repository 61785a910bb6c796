"""What a base has and training does not build comes along with every whole model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.parts_of_bases import add_mtp, save_with_vision
from tests.helpers.tiny import save_tiny
from xtuner.export.untrained import complete_from_base, find_untrained
from xtuner.export.weights import Weights


@pytest.mark.parametrize("shard", ["1GB", "100KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3"])
def test_a_folder_of_save_pretrained_is_completed(kind, shard, tmp_path):
    tied = {"tie_word_embeddings": True} if kind == "qwen3" else {}
    base, out = save_tiny(tmp_path / "base", kind, **tied), tmp_path / "out"
    mtp = add_mtp(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(out, max_shard_size=shard)
    before = set(Weights(out).infos)
    complete_from_base(out, model)
    found = Weights(out)
    assert set(found.infos) == before | set(mtp)
    assert all(found.read(name).equal(tensor.bfloat16()) for name, tensor in mtp.items())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == found.nbytes
    again, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert one.equal(other)


def test_a_complete_folder_stays_as_it_is(tmp_path, tiny_llama):
    model, out = AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "out"
    model.save_pretrained(out)
    files = sorted(file.name for file in out.iterdir())
    complete_from_base(out, model)
    assert sorted(file.name for file in out.iterdir()) == files


def test_another_models_folder_is_left_alone(tmp_path):
    """A classifier's base has a head that it does without."""
    base, out = save_tiny(tmp_path / "base"), tmp_path / "out"
    add_mtp(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(out)
    settings = json.loads((out / "config.json").read_text())
    settings["architectures"] = ["LlamaForSequenceClassification"]
    (out / "config.json").write_text(json.dumps(settings))
    complete_from_base(out, model)
    assert not any("mtp" in name for name in Weights(out).infos)


def test_parts_of_the_folders_own_class_are_named_not_copied(tmp_path):
    base = save_with_vision(tmp_path / "base")
    mtp = add_mtp(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    written = {name for name, _ in model.named_parameters()}
    found = find_untrained(base, model, written)
    assert {info.name for info in found.copied} == set(mtp)
    assert found.parts and all(name.startswith("model.visual.") for name in found.parts)


def test_a_model_without_a_language_model_has_no_base(tmp_path):
    complete_from_base(tmp_path, None)
    assert not list(tmp_path.iterdir())
