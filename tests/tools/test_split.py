"""`xtuner convert split`: one tensor a file, and the same model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from xtuner.entry_point import main


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_one_file_a_tensor(kind, tiny_llama, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(tiny_llama)
    source = tiny_llama
    if kind == "bin":
        source = tmp_path / "source"
        shutil.copytree(tiny_llama, source, ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save(whole.state_dict(), source / "pytorch_model.bin")
    out = tmp_path / "out"
    assert main(["convert", "split", str(source), str(out)]) == 0
    index = json.loads(next(out.glob("*.index.json")).read_text())
    assert set(index["weight_map"]) == set(whole.state_dict())
    assert len(set(index["weight_map"].values())) == len(whole.state_dict())
    split = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(split[name], value) for name, value in whole.state_dict().items())


def test_a_folder_without_weights(tmp_path, capsys):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert main(["convert", "split", str(tmp_path / "m"), str(tmp_path / "out")]) == 1
    assert "no weights here" in capsys.readouterr().err
